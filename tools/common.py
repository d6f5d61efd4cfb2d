# coding=utf-8
# Copyright 2026 The NCP-DPO authors. All rights reserved.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.

"""What several tools share: arguments, answers to mistakes, reading tables, and writing pairs as parquet files."""

import argparse
import bisect
import contextlib
import copy
import ctypes
import functools
import importlib.metadata
import itertools
import json
import logging
import os
import re
import signal
import sys
import tempfile
import traceback
from collections import Counter, deque
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import filelock
import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset, Features, Image, Value
from datasets.table import table_cast
from packaging.version import Version


TOOLS = Path(__file__).resolve().parent
ROOT = TOOLS.parent
# Tools import `preference_pairs` and the training scripts from here.
sys.path.insert(0, str(ROOT))

SCHEMA = Features({"jpg_0": Image(), "jpg_1": Image(), "label_0": Value("float64"), "caption": Value("string")})
READ_BATCH_SIZE = 32  # rows that are held in memory with their images
READ_BUFFER_BYTES = 4 << 20  # of each column
ROW_GROUP_SIZE, ROW_GROUP_BYTES = 100, 64 << 20  # readers of a parquet file hold a row group in memory
LOCK_NAME = ".lock"
# A warning is printed if images of one source win, or lose, at least this share of the pairs.
ONE_SIDED = 0.9


# Arguments


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Keeps the lines of descriptions, and adds a flag's default where its text does not say it."""

    def _get_help_string(self, action):
        default = action.default
        if default is None or default is False or default == argparse.SUPPRESS or "efault" in action.help:
            return action.help
        values = default if isinstance(default, list) else [default]
        return f"{action.help} Default: {' '.join(map(str, values))}."


class ArgumentParser(argparse.ArgumentParser):
    """A parser of a tool or, by `add_subparsers`, of one of its commands. It answers a mistake in one line."""

    def __init__(self, **options):
        super().__init__(**{"formatter_class": HelpFormatter, "allow_abbrev": False, **options})

    def error(self, message):
        self.exit(2, f"{self.prog}: error: {message}\n")


def add_command(commands, doc, name, help, **options):
    """A parser of the command `name`. Its help shows the examples in `doc` that call it."""
    examples = re.findall(rf"^    \S.* tools/\w+\.py {name} (?:.*\\\n)*.*\n", doc, re.MULTILINE)
    return commands.add_parser(name.split()[-1], help=help, description="".join([help, "\n\n", *examples]), **options)


def late_type(kind, find):
    """
    The argument type `find(preference_pairs)` of numbers of a `kind`. The module is imported at the first use: torch takes
    seconds to load.
    """

    def convert(text):
        import preference_pairs

        return find(preference_pairs)(text)

    convert.__name__ = kind.__name__
    return convert


def number_type(kind, rule, accepts):
    """`preference_pairs.number_type`, late."""
    return late_type(kind, lambda module: module.number_type(kind, rule, accepts))


COUNT = late_type(int, lambda module: module.COUNT)
NOT_NEGATIVE = late_type(float, lambda module: module.NOT_NEGATIVE)


# Mistakes


def is_mistake(error):
    """
    Whether an error says that the user's input is wrong. The system's errors do, and so do those that a check in a file of
    ours raises. What comes from within a library is a defect of ours.
    """
    if isinstance(error, OSError):
        return True
    raised = traceback.extract_tb(error.__traceback__)[-1]
    is_ours = Path(raised.filename).resolve().parent in (ROOT, TOOLS)
    return isinstance(error, (ImportError, ValueError)) and is_ours and raised.line.startswith("raise ")


def require_package(name, version="0"):
    """Raises an `ImportError` unless a package of `tools/requirements.txt` is there in this version or a later one."""
    try:
        installed = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        installed = None
    if installed is None or Version(installed) < Version(version):
        wanted = name if version == "0" else f"{name} {version} or later"
        has = installed or "none"
        raise ImportError(f"{wanted} is needed, and {has} is installed: run `pip install -r tools/requirements.txt`.")


def exit_code(function, *arguments):
    """What a function returns, 0 for `None`, or 2 after one line about a user's mistake. Defects keep their traceback."""
    try:
        return function(*arguments) or 0
    except Exception as error:
        if not is_mistake(error):
            raise
        print(f"{Path(sys.argv[0]).name}: error:", *str(error).split(), file=sys.stderr)
        return 2


def run(main, parse_args):
    """Runs a tool as a command and exits."""
    # Characters that the console's code page lacks are escaped.
    sys.stdout.reconfigure(errors="backslashreplace")
    # These warn that there is no torchvision, and that a U-Net's LoRA has nothing for text encoders.
    for name in ("transformers.utils.import_utils", "diffusers.loaders.lora_base"):
        logging.getLogger(name).setLevel(logging.ERROR)
    sys.exit(exit_code(lambda: main(parse_args())))


def end_with_parent(if_launched=False):
    """
    Has the operating system end this process when the process that started it ends, however that happens. Only Linux can. With
    `if_launched` only a process that `accelerate launch` has started.
    """
    launched = {"TORCHELASTIC_RUN_ID", "ACCELERATE_MIXED_PRECISION"} & os.environ.keys()
    if sys.platform == "linux" and (launched or not if_launched):
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


# Reading


def require_columns(columns, available, source):
    """Raises a `ValueError` for the first of `columns`, `{flag: column}`, that is not `available` in `source`."""
    for flag, column in columns.items():
        if column not in available:
            raise ValueError(
                f"{source} has no column {column!r} ({flag}); its columns are {', '.join(sorted(available))}"
            )


class ParquetFiles:
    """
    The rows of parquet files on the disk or at URLs, read in order: the part of `datasets.Dataset` that tools need. Only a
    batch of rows and `READ_BUFFER_BYTES` of each column are in memory, also where a row group is larger than the memory.

    `features` are the columns and the types to read them as. By default they are those of the first file, and later files
    keep their own types. `check` takes the schema of each file and raises a `ValueError` that says what is wrong with it.

    `datasets`' own streaming reads ahead without a bound, and its scanner's threads can abort Python when it exits
    (https://github.com/huggingface/datasets/issues/7566), which would falsify the exit code.
    """

    def __init__(self, files, features=None, check=None):
        self.files, self.check, self.metadata, self.rows = list(files), check, {}, None
        self.features, self.has_types = features, features is not None
        if features is None:
            with self.open(self.files[0]) as parquet:
                self.features = Features.from_arrow_schema(parquet.schema_arrow)

    @contextlib.contextmanager
    def open(self, file):
        try:
            # pyarrow has its own buffers. With those of fsspec too, the same bytes would be read several times.
            with fsspec.open(file, "rb", cache_type="none") as opened:
                options = {"buffer_size": READ_BUFFER_BYTES, "pre_buffer": False}
                parquet = pq.ParquetFile(opened, metadata=self.metadata.get(file), **options)
                self.metadata[file] = parquet.metadata
                if self.check is not None:
                    self.check(parquet.schema_arrow)
                if missing := set(self.features or ()) - set(parquet.schema_arrow.names):
                    raise ValueError(f"it has no {', '.join(sorted(missing))}, which {self.files[0]} has")
                yield parquet
        except (OSError, TypeError, ValueError, pa.ArrowException) as error:
            raise ValueError(f"{file}: {error}") from error

    def cast(self, table):
        if not self.has_types:
            return table
        features = Features({column: self.features[column] for column in table.column_names})
        return table_cast(table, features.arrow_schema)

    def select_columns(self, columns):
        selected = copy.copy(self)
        selected.features = Features({column: self.features[column] for column in columns})
        return selected

    def select(self, rows):
        """The rows of these ascending numbers. Those beyond the end are ignored."""
        selected = copy.copy(self)
        selected.rows = list(rows)
        return selected

    def find_selected(self, start, count):
        """The selected ones of `count` rows from row `start` on, counted from there."""
        if self.rows is None:
            return range(count)
        first, end = (bisect.bisect_left(self.rows, row) for row in (start, start + count))
        return [row - start for row in self.rows[first:end]]

    def iter(self, batch_size):
        """Tables of at most `batch_size` rows. Files and row groups without a selected row are not read."""
        start = 0
        for file in self.files:
            if self.rows is not None and (not self.rows or start > self.rows[-1]):
                return
            if file in self.metadata and not self.find_selected(start, self.metadata[file].num_rows):
                start += self.metadata[file].num_rows
                continue
            with self.open(file) as parquet:
                for group in range(parquet.num_row_groups):
                    num_rows = parquet.metadata.row_group(group).num_rows
                    if self.find_selected(start, num_rows):
                        yield from self.read_group(parquet, group, start, batch_size)
                    start += num_rows

    def read_group(self, parquet, group, start, batch_size):
        for batch in parquet.iter_batches(batch_size, [group], list(self.features)):
            if selected := self.find_selected(start, batch.num_rows):
                table = pa.Table.from_batches([batch])
                yield self.cast(table if self.rows is None else table.take(selected))
            start += batch.num_rows

    def iter_files(self, pool, ahead):
        """A table of each file. The threads of `pool` read up to `ahead` files that come next."""

        def read(file):
            with self.open(file) as parquet:
                return self.cast(parquet.read(list(self.features)))

        return map_ahead(pool, read, self.files, ahead)


def open_files(args, files, pool, ahead, other_features={}):
    """
    `ParquetFiles` of pairs, with the columns that training reads and `other_features`, and a `datasets.Dataset` of the labels
    and captions of those files that `--max_train_samples` needs. The threads of `pool` read up to `ahead` files that come next.
    """
    from preference_pairs import check_columns, pair_features

    features = pair_features(args)
    columns = [column for column, feature in features.items() if not isinstance(feature, Image)]
    opened = ParquetFiles(files, Features({**features, **other_features}), functools.partial(check_columns, args))
    tables, num_pairs = [], 0
    for table in opened.select_columns(columns).iter_files(pool, ahead):
        tables.append(table)
        num_pairs += sum(label != 0.5 for label in table[args.label_column].to_pylist())
        if args.max_train_samples is not None and num_pairs >= args.max_train_samples:
            break
    dataset = Dataset(pa.concat_tables(tables))
    dataset.info.download_checksums = dict.fromkeys(files)  # for `preference_pairs.digest_images`
    return opened, dataset


def read_files(files, rows):
    """`(row number, row)` of these rows of `ParquetFiles`, ascending. A thread reads one batch of rows ahead."""
    batches = files.select(rows).iter(READ_BATCH_SIZE)
    with ThreadPoolExecutor(1) as reader:
        tables = map_ahead(reader, lambda batches: next(batches, None), itertools.repeat(batches), 1)
        tables = itertools.takewhile(lambda table: table is not None, tables)
        yield from zip(rows, itertools.chain.from_iterable(table.to_pylist() for table in tables))


def map_ahead(pool, function, items, ahead):
    """`function` of every item, in order. The threads of `pool` compute up to `ahead` results that come next."""
    futures = deque()
    try:
        for item in items:
            futures.append(pool.submit(function, item))
            if len(futures) > ahead:
                yield futures.popleft().result()
        while futures:
            yield futures.popleft().result()
    finally:
        for future in futures:
            future.cancel()


def read_metadata(path):
    """All columns of a metadata.jsonl as a `datasets.Dataset` in arrow format."""
    if not os.path.isfile(path):
        raise ValueError(f"{path} does not exist; --train_data_dir needs it, with one JSON object per line")
    rows = []
    with open(path, "rb") as file:
        for line_number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                # `json.loads` of bytes accepts a byte-order mark.
                rows.append(dict(json.loads(line)))
                # Fails for half of a surrogate pair, which no file can hold.
                json.dumps(rows[-1], ensure_ascii=False).encode()
            except (TypeError, ValueError) as error:
                raise ValueError(f"{path}, line {line_number}: not a JSON object ({error})") from error
    if not rows:
        raise ValueError(f"{path} has no rows")
    columns = {}
    for name in dict.fromkeys(itertools.chain.from_iterable(rows)):
        try:
            columns[name] = pa.array([row.get(name) for row in rows])
        except (OverflowError, pa.ArrowException) as error:
            raise ValueError(f"{path} mixes types in column {name}: {error}") from error
    return Dataset.from_dict(columns).with_format("arrow")


def iter_rows(rows):
    """The rows of `ParquetFiles`, or of a `datasets.Dataset` in arrow format, one by one as dicts."""
    for table in rows.iter(batch_size=READ_BATCH_SIZE):
        yield from table.to_pylist()


# Pairs


def pair_ranks(ranks, pairs, higher_is_better):
    """
    `(winner, loser)` positions in `ranks`. `pairs` is "all" (every two of different ranks), "best_worst" (the best against
    the worst) or "adjacent" (every rank against the next). Images of the same rank make no pair with each other.
    """
    different = sorted(set(ranks), reverse=higher_is_better)
    levels = [[position for position, other in enumerate(ranks) if other == rank] for rank in different]
    contests = {
        "all": itertools.combinations(levels, 2),
        "best_worst": zip(levels[:1], levels[1:][-1:]),
        "adjacent": zip(levels, levels[1:]),
    }[pairs]
    return [pair for winners, losers in contests for pair in itertools.product(winners, losers)]


def name_source(model, lora=None):
    """Where an image comes from, in words."""
    return f"{model or 'no model'}{f' with {lora}' if lora else ''}"


def source_warning(pairs):
    """A warning if images of one source win, or lose, nearly all `pairs`, `(winner's source, loser's source)`, or `None`."""
    for side, role in enumerate(("winner", "loser")):
        counts = Counter(pair[side] for pair in pairs if pair[0] != pair[1])
        for source, count in counts.most_common(1):
            if count >= ONE_SIDED * len(pairs):
                return (
                    f"in {count:,} of {len(pairs):,} pairs the {role} is from {source} and the other image is not. A model "
                    "trained on this learns to tell the sources apart, such as real from generated images, and its images "
                    "are known to collapse. Take both images of a pair from the same source."
                )
    return None


# Writing


@contextlib.contextmanager
def locked_folder(folder, is_main_process=True):
    """
    Creates an output folder and keeps other runs from writing to it. The main process of a run holds the lock. The operating
    system frees it when the process ends.
    """
    if not is_main_process:
        yield
        return
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(folder / LOCK_NAME)
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        raise ValueError(f"--output_dir {folder} is being written by another run. Wait for its end.") from None
    try:
        yield
    finally:
        lock.release()


def refuse_foreign(folder, mark, names):
    """A `ValueError` if a folder has nothing of the pattern `mark`, which every run begins with, but one of these files."""
    if not any(Path(folder).glob(mark)) and (others := [name for name in names if Path(folder, name).exists()]):
        raise ValueError(f"--output_dir {folder} holds {others[0]}, which is not from this tool. Give a new folder.")


@contextlib.contextmanager
def whole_file(path):
    """A path to write to. The file appears at `path` when it is whole. An error leaves an earlier file as it was."""
    path = Path(path)
    incomplete = path.with_name(f"{path.name}.incomplete")
    try:
        yield incomplete
        os.replace(incomplete, path)
    finally:
        incomplete.unlink(missing_ok=True)


def require_empty(folder):
    """Raises a `ValueError` if there is something else than a lock in the folder of `--output_dir`."""
    if others := [path.name for path in folder.glob("*") if path.name != LOCK_NAME]:
        raise ValueError(f"--output_dir {folder} is not empty: it holds {others[0]}. Give a new folder.")


def write_shards(pairs, features, output_dir, max_shard_bytes, replaced=()):
    """
    Writes pairs as parquet files, all of them or none, then removes the files `replaced`, which an earlier call wrote.
    Returns the numbers of pairs and of files. A `ValueError` says that there is no pair; then nothing is removed.
    """
    os.makedirs(output_dir, exist_ok=True)
    num_pairs, shards, groups = 0, [], row_groups(pairs)
    with tempfile.TemporaryDirectory(dir=output_dir, prefix=".incomplete-") as folder:
        for first_group in groups:
            shards.append(os.path.join(folder, f"{len(shards)}.parquet"))
            with pq.ParquetWriter(shards[-1], features.arrow_schema) as writer:
                shard_bytes = 0
                for group in itertools.chain([first_group], groups):
                    table = pa.Table.from_pylist(group, schema=features.arrow_schema)
                    writer.write_table(table)
                    num_pairs += len(group)
                    shard_bytes += table.nbytes
                    if shard_bytes >= max_shard_bytes:
                        break
        if num_pairs == 0:
            raise ValueError("no pair is left; the log names what was skipped")
        names = [f"train-{index:05d}-of-{len(shards):05d}.parquet" for index in range(len(shards))]
        for shard, name in zip(shards, names):
            os.replace(shard, os.path.join(output_dir, name))
    for path in map(Path, replaced):
        if path.name not in names:
            path.unlink()
    return num_pairs, len(shards)


def row_groups(pairs):
    """Collects pairs into lists of at most `ROW_GROUP_SIZE` pairs or about `ROW_GROUP_BYTES` of images."""
    group, num_bytes = [], 0
    for pair in pairs:
        group.append(pair)
        num_bytes += len(pair["jpg_0"]["bytes"]) + len(pair["jpg_1"]["bytes"])
        if len(group) == ROW_GROUP_SIZE or num_bytes >= ROW_GROUP_BYTES:
            yield group
            group, num_bytes = [], 0
    if group:
        yield group

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

"""Which pairs scorers agree on, for `collect_preferences.py judge`: pairs of drawn pictures, or pairs that exist."""

import functools
import hashlib
import json
import logging
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from common import (
    SCHEMA,
    ParquetFiles,
    locked_folder,
    map_ahead,
    open_files,
    pair_ranks,
    read_files,
    read_metadata,
    require_empty,
    row_groups,
    source_warning,
    whole_file,
)
from datasets import Features, Value
from preference_pairs import (
    InputError,
    columns_of,
    digest_files,
    digest_images,
    digest_of_pairs,
    find_rows,
    image_bytes,
    load_dataset,
    read_images,
)
from prepare_preferences import SOURCE_COLUMNS, metadata_features, open_dataset, read_sources
from scorers import SCORING_BATCH_SIZE, check_scores, load_scorers
from tqdm.auto import tqdm


logger = logging.getLogger("collect_preferences")

SETTINGS_NAME = "judging.json"
# Pairs that are judged for each file.
SHARD_SIZE = 256
# A run that goes on with a folder must have the same values.
SETTINGS = "keep relabel image_0_column image_1_column label_column caption_column max_train_samples".split()
# A scorer's margin times this factor is the logit of the probability to win (Bradley and Terry 1952). HPSv2 is a plain cosine.
LOGITS = {"hpsv2": 100}


def choose_pairs(args, names, prompts, versions):
    """The pairs on which all scorers agree by a large enough margin, as `write_pairs` takes them, and a report."""
    candidates = []
    for rows in prompts.values():
        ranked = pair_ranks([picture["scores"][0] for picture in rows], args.pairs, higher_is_better=True)
        candidates += [(rows[first], rows[second]) for first, second in sorted(map(sorted, ranked))]
    scores = np.array([[first["scores"], second["scores"]] for first, second in candidates]).reshape(-1, 2, len(names))
    margins = scores[:, 0] - scores[:, 1]
    agree = (margins > 0).all(axis=1) | (margins < 0).all(axis=1)
    least = np.broadcast_to(args.min_margin, len(names))
    if args.min_margin_quantile is not None and len(margins):
        least = np.quantile(abs(margins), args.min_margin_quantile, axis=0)
    wide = (abs(margins) >= least).all(axis=1)
    kept = np.flatnonzero(agree & wide)
    counts = f"{len(agree):,} pairs ({args.pairs}); scorers agree on {agree.sum():,}; {wide.sum():,} have the margin"
    if not len(kept):
        raise ValueError(f"No pair is left of {counts} that --min_margin or --min_margin_quantile asks for.")
    pairs, probabilities = [], win_probability(names, margins)
    for index in kept:
        columns = {"label_0": float(margins[index, 0] > 0), "probability_0": probabilities[index], "scorers": versions}
        columns |= {f"{name}_{side}": scores[index, side, k] for k, name in enumerate(names) for side in (0, 1)}
        pairs.append((*candidates[index], columns))
    lines = [f"{len(prompts):,} prompts: {counts}; {len(kept):,} have both and are kept.", "", f"Scorers: {versions}"]
    return pairs, "\n".join([*lines, *describe_margins(names, margins, kept)]) + "\n"


def win_probability(names, margins):
    """The probability that image 0 wins: the mean over scorers of the logistic function of their `margins`, `(..., scorers)`."""
    logits = margins * np.array([LOGITS.get(name, 1) for name in names])
    return (1 / (1 + np.exp(-logits))).mean(axis=-1)


def describe_margins(names, margins, kept):
    """Markdown tables: how often each two scorers agree, and the histogram of each scorer's margins. Lines of text."""
    lines = ["", "| agree | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
    signs = np.sign(margins)
    for k, name in enumerate(names):
        shares = (signs == signs[:, [k]]).mean(axis=0)
        lines.append(f"| {name} | {' | '.join(f'{share:.0%}' for share in shares)} |")
    for k, name in enumerate(names):
        lines += ["", f"| margin of {name} | pairs | kept |", "|---|---|---|"]
        edges = np.histogram_bin_edges(abs(margins[:, k]))
        counts, num_kept = (np.histogram(abs(margins[rows, k]), edges)[0] for rows in (slice(None), kept))
        for low, high, *numbers in zip(edges, edges[1:], counts, num_kept):
            lines.append(f"| {low:.4g} - {high:.4g} | {numbers[0]:,} | {numbers[1]:,} |")
    return lines


# Pairs that exist


class Pairs(NamedTuple):
    """The pairs to judge."""

    read: Callable  # yields `(row number, row)` of ascending row numbers
    rows: list  # numbers of the rows with a winner, and of ties with `--keep all`
    others: Features  # of the further columns
    digest: dict  # of rows, labels, captions and images


def open_pairs(args, pool):
    """The `Pairs` of `--dataset_name` or `--train_data_dir`. Parquet files are read in order where they are."""
    if args.train_data_dir is not None:
        found = read_metadata(os.path.join(args.train_data_dir, "metadata.jsonl"))
    else:
        source = args.dataset_name, args.dataset_config_name, args.dataset_split_name, args.cache_dir
        try:
            found = open_dataset(*source, in_place=True)
        except ValueError as error:
            raise ValueError(f"--dataset_name {args.dataset_name}: {error}") from error
    own = {*added_features(args), args.image_0_column, args.image_1_column}
    others = metadata_features(found.features, args).items()
    others = Features({name: feature for name, feature in others if name not in own})
    if isinstance(found, ParquetFiles):
        files, dataset = open_files(args, found.files, pool, ahead=4, other_features=others)
        read = functools.partial(read_files, files)
        is_local = os.path.exists(args.dataset_name)
        images = digest_local_files(args, found.files) if is_local else digest_images(args, dataset)
    else:
        dataset = load_dataset(args)
        images = digest_images(args, dataset)
        found = found.with_format(None).select_columns(list(others)) if others else [{}] * len(dataset)

        def read(rows):
            return ((row, {**found[row], **dataset[row]}) for row in rows)

    rows = find_rows(args, dataset)
    if args.keep == "all":
        rows = list(range(len(dataset) if args.max_train_samples is None else rows[-1] + 1))
    return Pairs(read, rows, others, digest_of_pairs(rows, *columns_of(args, dataset.select(rows)), images))


def digest_local_files(args, files):
    """A digest of parquet files and of the images that they name. Embedded images are not read for it."""
    named = set()
    for file in files:
        schema = pq.read_schema(file)
        for column in (args.image_0_column, args.image_1_column):
            if column in schema.names and pa.types.is_struct(schema.field(column).type):
                (paths,) = pq.read_table(file, columns=[f"{column}.path"]).flatten().columns
                named.update(filter(None, paths.to_pylist()))
    return digest_files([*files, *sorted(os.path.join(args.dataset_name, path) for path in named)])


def added_features(args, names=()):
    """The columns that judging adds, with scorers of these names."""
    features = {"probability_0": Value("float64"), "scorers": Value("string"), "scorers_agree": Value("bool")}
    if args.relabel:
        features["relabelled"] = Value("bool")
    return features | {f"{name}_{part}": Value("float64") for name in names for part in ("0", "1", "margin")}


class Decision(NamedTuple):
    """What becomes of N pairs. All are arrays of shape `(N,)`."""

    labels: np.ndarray
    num_agree: np.ndarray  # how many scorers prefer the label's winner; 0 for a tie
    relabelled: np.ndarray
    kept: np.ndarray


def decide(args, labels, margins):
    """The `Decision` on pairs by their labels, `(N,)`, and the scorers' margins, `(N, scorers)`. A tie stays a tie."""
    sides, signs = np.sign(labels - 0.5), np.sign(margins)
    relabelled = (sides != 0) & (signs == -sides[:, None]).all(axis=1) & args.relabel
    sides = np.where(relabelled, -sides, sides)
    num_agree = ((signs == sides[:, None]) & (sides[:, None] != 0)).sum(axis=1)
    least = {"agree": signs.shape[1], "majority": signs.shape[1] // 2 + 1, "all": 0}[args.keep]
    return Decision((sides + 1) / 2, num_agree, relabelled, num_agree >= least)


def judge_pairs(args, accelerator):
    """Judges the pairs of `--dataset_name` or `--train_data_dir` and writes those that are kept to `--output_dir`."""
    folder = Path(args.output_dir)
    if not (folder / SETTINGS_NAME).is_file():
        require_empty(folder)
    with locked_folder(folder, accelerator.is_main_process), ThreadPoolExecutor() as pool:
        scorers = load_scorers(args)
        with accelerator.main_process_first():
            pairs = open_pairs(args, pool)
            open_folder(args, folder, scorers, pairs)
        shards = list_shards(folder, len(pairs.rows))
        missing = [shard for shard in shards if not shard[1].is_file()]
        # No process writes before all have seen what is missing.
        accelerator.wait_for_everyone()
        # Neighbours read the same row groups, so each process has one part of the shards.
        part = np.array_split(range(len(missing)), accelerator.num_processes)[accelerator.process_index]
        missing = [missing[index] for index in part]
        for scorer in scorers.values():
            scorer.to(accelerator.device)
        rows = [row for *_, place in missing for row in pairs.rows[place]]
        decoded = map_ahead(pool, functools.partial(decode_pair, args), pairs.read(rows), SCORING_BATCH_SIZE)
        bar = tqdm(total=len(rows), desc="Judging", unit=" pairs", disable=not accelerator.is_local_main_process)
        try:
            for *paths, place in missing:
                readable = filter(None, count(bar, islice(decoded, place.stop - place.start)))
                write_shard(args, scorers, pairs.others, *paths, score_pairs(args, scorers, readable))
        except OSError as error:
            raise OSError(f"--output_dir {folder} cannot be written: {error}. The same command goes on.") from error
        bar.close()
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            report = describe_judging(args, scorers, len(pairs.rows), shards)
            (folder / "report.md").write_text(report, encoding="utf-8")
            print(report)


def count(bar, items):
    """The items, which a progress bar counts."""
    for item in items:
        bar.update()
        yield item


def open_folder(args, folder, scorers, pairs):
    """Starts a folder, or continues it. A `ValueError` names what is not as it was when it was started."""
    path, settings = folder / SETTINGS_NAME, {name: getattr(args, name) for name in SETTINGS}
    settings |= {"scorers": {name: scorer.version for name, scorer in scorers.items()}, "pairs": pairs.digest}
    if path.is_file():
        for name, before in json.loads(path.read_text(encoding="utf-8")).items():
            if name == "pairs" and before != settings[name]:
                source = f"--train_data_dir {args.train_data_dir}" if args.train_data_dir else ""
                source = source or f"--dataset_name {args.dataset_name}"
                raise ValueError(
                    f"{source} holds other pairs than {folder} was begun with. Give another --output_dir."
                )
            if before != settings[name]:
                values = f"is {settings[name]!r}, but {folder} was begun with {before!r}"
                raise ValueError(f"--{name} {values}. Give another --output_dir.")
        return
    (folder / "scores").mkdir(parents=True, exist_ok=True)
    with whole_file(path) as incomplete:
        incomplete.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def list_shards(folder, num_pairs):
    """
    For each shard the file of the pairs that are kept, the file of all scores, and which of the pairs are judged for it. The
    scores are written last.
    """
    starts = range(0, num_pairs, SHARD_SIZE)
    names = [f"{index:05}-of-{len(starts):05}.parquet" for index in range(len(starts))]
    return [
        (folder / f"train-{name}", folder / "scores" / name, slice(start, min(start + SHARD_SIZE, num_pairs)))
        for name, start in zip(names, starts)
    ]


def decode_pair(args, pair):
    """`(row number, row, images, encoded images)`. `None` skips the pair."""
    row_number, row = pair
    try:
        images = list(read_images(args, row_number, row))
    except InputError as error:
        if args.on_bad_sample == "error":
            raise
        logger.warning(f"{error}. The pair is left out")
        return None
    if row[args.label_column] == 0:
        # The winner came first.
        images.reverse()
    columns = (args.image_0_column, args.image_1_column)
    return row_number, row, images, [image_bytes(args, row[column]) for column in columns]


@torch.no_grad()
def score_pairs(args, scorers, decoded):
    """
    Yields `(row number, row, encoded images, scores)` of pairs that are the results of `decode_pair`. The scores are an array
    of shape `(2, scorers)`. A picture that comes again under its prompt is not scored again.
    """
    known = {}
    while batch := list(islice(decoded, SCORING_BATCH_SIZE // 2)):
        new, keys = {}, []
        for row_number, row, images, encoded in batch:
            caption = row[args.caption_column]
            keys.append([(caption, hashlib.sha256(data).digest()) for data in encoded])
            for column, key, image in zip((args.image_0_column, args.image_1_column), keys[-1], images):
                if key not in known:
                    new.setdefault(key, (f"Row {row_number} ({caption!r:.80}), {column}", image))
        if new:
            (prompts, _), (names, images) = zip(*new), zip(*new.values())
            scores = {name: scorer(list(prompts), list(images)).tolist() for name, scorer in scorers.items()}
            for name, values in scores.items():
                check_scores(name, names, values)
            known |= zip(new, zip(*scores.values()))
        for (row_number, row, _, encoded), keys_of_pair in zip(batch, keys):
            yield row_number, row, encoded, np.array([known[key] for key in keys_of_pair])


def write_shard(args, scorers, others, pairs_path, scores_path, judged):
    """Writes the pairs that are kept of `judged`, the results of `score_pairs`, and then the scores of all of them."""
    from train_ncp_dpo_sd15 import synchronize

    names, score_rows = list(scorers), []
    features = Features({**SCHEMA, **others, **added_features(args, names)})
    versions = ", ".join(f"{name}: {scorer.version}" for name, scorer in scorers.items())

    def records():
        for row_number, row, encoded, scores in judged:
            values = {f"{name}_{side}": scores[side, k] for k, name in enumerate(names) for side in (0, 1)}
            label, margins = row[args.label_column], scores[0] - scores[1]
            score_rows.append({"row": row_number, "label": label, **values})
            decision = decide(args, np.array([label]), margins[None])
            if decision.kept[0]:
                images = {f"jpg_{side}": {"bytes": data, "path": None} for side, data in enumerate(encoded)}
                added = {"probability_0": win_probability(names, margins), "scorers": versions, **values}
                added |= {f"{name}_margin": margin for name, margin in zip(names, margins)}
                added |= {"scorers_agree": None if label == 0.5 else bool(decision.num_agree[0] == len(names))}
                added |= {"relabelled": bool(decision.relabelled[0])} if args.relabel else {}
                pair = {"label_0": decision.labels[0], "caption": row[args.caption_column]}
                yield {**{name: row[name] for name in others}, **images, **pair, **added}

    with whole_file(pairs_path) as incomplete:
        with pq.ParquetWriter(incomplete, features.arrow_schema) as writer:
            for group in row_groups(records()):
                writer.write_table(pa.Table.from_pylist(group, schema=features.arrow_schema))
        synchronize(incomplete)
    scores = Features({"row": Value("int64"), "label": Value("float64")})
    scores |= {f"{name}_{side}": Value("float64") for name in names for side in (0, 1)}
    with whole_file(scores_path) as incomplete:
        pq.write_table(pa.Table.from_pylist(score_rows, schema=Features(scores).arrow_schema), incomplete)
        synchronize(incomplete)


def describe_judging(args, scorers, num_pairs, shards):
    """The report on a folder. A `ValueError` if no pair is kept."""
    names = list(scorers)
    scores = pa.concat_tables([pq.read_table(path) for _, path, _ in shards])
    sides = [np.column_stack([scores[f"{name}_{side}"] for name in names]) for side in (0, 1)]
    labels, margins = scores["label"].to_numpy(), sides[0] - sides[1]
    decision, ties = decide(args, labels, margins), labels == 0.5
    against = (~ties & (np.sign(margins) == np.sign(0.5 - labels)[:, None]).all(axis=1)).sum()
    agree = np.sign(margins[~ties]) == np.sign(labels[~ties] - 0.5)[:, None]
    counts = {
        "pairs": num_pairs,
        "unreadable, left out": num_pairs - len(labels),
        "ties": ties.sum(),
        "all scorers agree with the label": agree.all(axis=1).sum(),
        "a majority agrees with the label": (agree.sum(axis=1) > len(names) / 2).sum(),
        "all scorers prefer the other image": against,
        "relabelled": decision.relabelled.sum(),
        f"kept (--keep {args.keep})": decision.kept.sum(),
    }
    if not decision.kept.any():
        counts = ", ".join(f"{name}: {count:,}" for name, count in counts.items())
        raise ValueError(f"No pair is kept by --keep {args.keep}. {counts}.")
    lines = ["| | pairs |", "|---|---|", *(f"| {name} | {count:,} |" for name, count in counts.items())]
    lines += ["", *(f"{name}: {scorer.version}  " for name, scorer in scorers.items())]
    lines += ["", "| scorer | agrees with the label |", "|---|---|"]
    lines += [f"| {name} | {share:.0%} |" for name, share in zip(names, agree.mean(axis=0))]
    lines += describe_margins(names, margins, np.flatnonzero(decision.kept))
    if warning := source_warning(read_written_sources([path for path, *_ in shards])):
        logger.warning(warning)
        lines += ["", f"Warning: {warning}"]
    return "\n".join(lines) + "\n"


def read_written_sources(files):
    """The sources of the winner and the loser of the pairs in `files`, if the data have them."""
    files = ParquetFiles(files)
    files = files.select_columns([name for name in ("label_0", *SOURCE_COLUMNS) if name in files.features])
    table = pa.concat_tables(files.iter(10_000)).to_pydict()
    return read_sources(table.pop("label_0"), table)

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

"""Folders of pictures and their metadata.jsonl, and the pairs that are made of them, for `collect_preferences.py`."""

import logging
from collections import defaultdict
from pathlib import Path

from common import SCHEMA, iter_rows, name_source, read_metadata, source_warning, write_shards
from datasets import Features, Value
from huggingface_hub.utils.sha import sha_fileobj
from tqdm.auto import tqdm


logger = logging.getLogger("collect_preferences")

RECORD_NAME = "metadata.jsonl"
# How a picture was drawn. Pairs have these columns with _0 and _1 at the end.
PROVENANCE = {
    **dict.fromkeys("file_name model variant revision lora_weights lora_digest scheduler".split(), Value("string")),
    **dict.fromkeys("seed num_inference_steps resolution".split(), Value("int64")),
    "guidance_scale": Value("float64"),
    "mixed_precision": Value("string"),
}
SHARD_BYTES = 500 << 20


def digest_of_file(path):
    with open(path, "rb") as file:
        return sha_fileobj(file).hex()


def load_picture(path):
    from preference_pairs import read_image

    try:
        return read_image(Path(path).read_bytes())
    except Exception as error:
        raise ValueError(f"{path} cannot be read: {error}. Remove it to have it drawn again.") from error


def read_pictures(input_dir):
    """
    The pictures of each prompt that has two or more: `{prompt: [line of metadata.jsonl, with the picture's path and digest]}`.
    Missing pictures, and those that equal another one of their prompt, are left out with a warning. A `ValueError` names a
    line that is wrong or leads out of the folder.
    """
    from preference_pairs import same_prompt_key

    file = Path(input_dir, RECORD_NAME)
    if not file.is_file():
        raise ValueError(f"--input_dir {input_dir} has no {RECORD_NAME}. Give the folder that draw wrote.")
    folder, prompts, missing, repeated = Path(input_dir).resolve(), defaultdict(dict), [], []
    for index, row in enumerate(iter_rows(read_metadata(str(file)))):
        for column in ("file_name", "prompt"):
            if not isinstance(row.get(column), str):
                raise ValueError(f"{file}, picture {index}: {column} is {row.get(column)!r:.80}, but must be a text.")
        row["path"] = Path(input_dir, row["file_name"])
        # A folder from somebody else must not read other files of this machine.
        if not row["path"].resolve().is_relative_to(folder):
            raise ValueError(
                f"{file}, picture {index}: {row['file_name']!r:.200} leads out of --input_dir {input_dir}."
            )
        if not row["path"].is_file():
            missing.append(row["file_name"])
            continue
        row["digest"] = digest_of_file(row["path"])
        first = prompts[same_prompt_key(row["prompt"])].setdefault(row["digest"], row)
        if first["file_name"] != row["file_name"]:
            repeated.append(f"{row['file_name']}, which equals {first['file_name']}")
    if missing:
        logger.warning(f"{len(missing)} pictures of {file} are missing and left out, the first is {missing[0]}")
    if repeated:
        logger.warning(
            f"{len(repeated)} pictures equal another of their prompt and are left out, the first is {repeated[0]}"
        )
    if alone := [row["prompt"] for rows in prompts.values() if len(rows) == 1 for row in rows.values()]:
        logger.warning(f"{len(alone)} prompts with only one picture are left out, the first is {alone[0]!r:.80}")
    groups = [list(rows.values()) for rows in prompts.values() if len(rows) > 1]
    if not groups:
        raise ValueError(f"--input_dir {input_dir} has no two pictures of a prompt. Draw them first.")
    return {rows[0]["prompt"]: rows for rows in groups}


def write_pairs(output_dir, pairs, features, replaced=()):
    """
    Writes pairs, `(picture 0, picture 1, further columns)`, as parquet files in the trainers' schema, with how their pictures
    were drawn, then removes the files `replaced`. Returns a warning if winners and losers come from different sources.
    """
    provenance = {f"{name}_{side}": kind for side in (0, 1) for name, kind in PROVENANCE.items()}
    sources = []
    for *pictures, row in pairs:
        names = [name_source(picture.get("model"), picture.get("lora_weights")) for picture in pictures]
        if row["label_0"] != 0.5:
            sources.append(names if row["label_0"] == 1 else names[::-1])
    if warning := source_warning(sources):
        logger.warning(warning)

    def rows():
        for *pictures, row in tqdm(pairs, unit=" pairs", desc="Writing"):
            row = {**row, "caption": pictures[0]["prompt"]}
            for side, picture in enumerate(pictures):
                row[f"jpg_{side}"] = {"bytes": picture["path"].read_bytes(), "path": None}
                row |= {f"{name}_{side}": picture.get(name) for name in PROVENANCE}
            yield row

    try:
        write_shards(rows(), Features({**SCHEMA, **features, **provenance}), output_dir, SHARD_BYTES, replaced)
    except OSError as error:
        raise OSError(f"--output_dir {output_dir} cannot be written: {error}. No pairs were added to it.") from error
    return warning

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

"""The page on which people rate pictures, and the pairs of what they chose, for `collect_preferences.py rate`."""

import hashlib
import itertools
import json
import logging
import os
import random
import secrets
import shutil
import signal
import statistics
import threading
import time
from collections import Counter, defaultdict
from datetime import datetime, timezone

import pyarrow as pa
import pyarrow.parquet as pq
from common import whole_file
from datasets import Value
from picture_records import digest_of_file, load_picture, write_pairs
from tqdm.auto import tqdm


logger = logging.getLogger("collect_preferences")

CHOICES_NAME = "choices.jsonl"
# A rater's name is free again after so many seconds without a sign of life from the page.
LEASE = 15


def list_written(folder):
    """The parquet files of a folder that an earlier `rate` wrote, and the other ones."""
    written, others = [], []
    for path in sorted(folder.glob("*.parquet")):
        try:
            is_rated = path.match("train-*-of-*") and "raters" in pq.read_schema(path).names
        except (OSError, pa.ArrowException):
            is_rated = False
        (written if is_rated else others).append(path)
    return written, others


def check_rated_folder(folder):
    """Raises a `ValueError` if the folder holds pairs that `rate` did not write. `convert` copies the columns of `rate`."""
    written, others = list_written(folder)
    if not (folder / CHOICES_NAME).is_file():
        others += [*written, *folder.glob("report.md")]
    if others:
        raise ValueError(
            f"--output_dir {folder} holds {others[0].name}, which rate did not write. Give another folder."
        )


def number_pairs(prompts):
    """
    Every two pictures of every prompt, `{key: (picture, picture)}`. The key depends on the prompt and the pictures' content.
    The first pairs of all prompts come first, then the second ones, so that a rater who stops early has seen all prompts.
    """
    rounds = []
    for prompt, rows in tqdm(prompts.items(), desc="Reading pictures"):
        for picture in rows:
            load_picture(picture["path"])
        pairs = list(itertools.combinations(rows, 2))
        random.Random(prompt).shuffle(pairs)
        rounds.append(pairs)
    keyed = {}
    for pair in filter(None, itertools.chain.from_iterable(itertools.zip_longest(*rounds))):
        content = [pair[0]["prompt"], *(picture["digest"] for picture in pair)]
        keyed[hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]] = pair
    return keyed


def is_there(pair):
    return all(picture["path"].is_file() for picture in pair)


class Choices:
    """
    What raters chose, `by_rater[rater][pair]`, in order. Each choice is appended to a file as one line. Choices whose picture
    was removed stay in the file and count for nothing.
    """

    LABELS = {"picture_0": 1.0, "picture_1": 0.0, "tie": 0.5, "skip": None}

    def __init__(self, path, pairs):
        self.path, self.pairs, self.by_rater, self.seconds = path, pairs, defaultdict(dict), defaultdict(list)
        path.touch()
        lines = path.read_bytes().split(b"\n")
        if lines[-1]:
            logger.warning(f"{path} ends in half a line, which a crash left there. It is removed")
            os.truncate(path, path.stat().st_size - len(lines[-1]))
        file_names, removed = {picture["file_name"] for pair in pairs.values() for picture in pair}, []
        for line_number, line in enumerate(lines[:-1], start=1):
            try:
                entry = json.loads(line)
                if entry["pair"] in pairs:
                    self.apply(entry)
                elif {entry["picture_0"], entry["picture_1"]} <= file_names:
                    raise ValueError("its pictures in --input_dir were replaced. Give another --output_dir")
                else:
                    removed.append(f"{entry['picture_0']} or {entry['picture_1']}")
            except (KeyError, TypeError, ValueError) as error:
                raise ValueError(f"{path}, line {line_number}: {error}.") from error
        if removed:
            logger.warning(f"{len(removed)} choices are left out: --input_dir no longer has {removed[0]}")

    def apply(self, entry):
        if entry["choice"] == "undo":
            del self.by_rater[entry["rater"]][entry["pair"]]
        else:
            self.by_rater[entry["rater"]][entry["pair"]] = self.LABELS[entry["choice"]]
            self.seconds[entry["rater"]].append(entry["seconds"])

    def add(self, **entry):
        """Returns when the choice is on the disk. After an `OSError`, the file is as it was before."""
        entry["time"] = datetime.now(timezone.utc).isoformat(timespec="seconds")
        size = self.path.stat().st_size
        try:
            with open(self.path, "ab") as file:
                file.write(json.dumps(entry).encode() + b"\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError:
            os.truncate(self.path, size)
            raise
        self.apply(entry)


class Page:
    """What raters see and do. `served` is the folder from which browsers may read pictures, under random names."""

    def __init__(self, choices, served):
        self.choices, self.served, self.lock = choices, served, threading.Lock()
        self.served_paths, self.active, self.shown_at, self.removed = {}, {}, {}, set()

    def act(self, data):
        """What a rater's page shows after an `action`: start, ping, left, right, tie, skip or undo."""
        with self.lock:
            rater = " ".join(str(data["rater"]).split())[:50]
            return self.answer(rater, data["tab"], data["action"], data["pair"])

    def answer(self, rater, tab, action, pair):
        if not rater:
            return {"error": "Please give your name."}
        now = time.monotonic()
        active_tab, heard_at = self.active.get(rater, (tab, now))
        if active_tab != tab and now - heard_at < LEASE:
            return {"error": f"{rater} is rating in another window. Close it, wait {LEASE} s, or give another name."}
        self.active[rater] = tab, now
        if action == "ping":
            return {}
        try:
            self.record(rater, action, pair, now)
        except OSError as error:
            return {"error": f"Not saved: {error}. Choose again when there is room."}
        self.shown_at[rater] = time.monotonic()
        try:
            return self.show(rater)
        except OSError as error:
            return {"error": f"The next pair cannot be shown: {error}. Your choice is saved."}

    def record(self, rater, action, pair, now):
        chosen, sides = self.choices.by_rater.get(rater), {"left": 0, "right": 1}
        # A key that was pressed twice, or an old page, names a pair that is not the next one.
        if action in ("left", "right", "tie", "skip") and [pair] == self.next_pairs(rater, 1):
            left = self.left(rater, pair)
            choice = f"picture_{sides[action] ^ left}" if action in sides else action
            seconds = round(now - self.shown_at.get(rater, now), 1)
            description = self.describe(pair)
            self.choices.add(rater=rater, **description, left=f"picture_{left}", choice=choice, seconds=seconds)
        elif action == "undo" and chosen:
            self.choices.add(rater=rater, **self.describe(list(chosen)[-1]), choice="undo")

    def next_pairs(self, rater, count):
        """The next pairs of a rater. Those whose picture was removed are passed over."""
        chosen, found = self.choices.by_rater.get(rater, ()), []
        for pair in self.choices.pairs:
            if len(found) < count and pair not in chosen:
                if is_there(self.choices.pairs[pair]):
                    found.append(pair)
                elif pair not in self.removed:
                    self.removed.add(pair)
                    names = " or ".join(picture["file_name"] for picture in self.choices.pairs[pair])
                    logger.warning(f"A pair is passed over: {names} was removed")
        return found

    def left(self, rater, pair):
        """Which picture of a pair is on the left. It is random, but the same after a reload."""
        return random.Random(f"{rater} {pair}").randrange(2)

    def describe(self, pair):
        first, second = self.choices.pairs[pair]
        names = {"picture_0": first["file_name"], "picture_1": second["file_name"]}
        return {"pair": pair, "prompt": first["prompt"], **names}

    def show(self, rater):
        next_pairs, chosen = self.next_pairs(rater, 2), self.choices.by_rater.get(rater, {})
        total, done = len(self.choices.pairs) - len(self.removed - chosen.keys()), len(chosen)
        status = f"{done:,} of {total:,}"
        recent = self.choices.seconds[rater][-50:]
        if recent and done < total:
            status += f", about {max(1, round((total - done) * statistics.median(recent) / 60))} min left"
        state = {"rater": rater, "done": done, "total": total, "status": status, "pair": None, "pictures": []}
        urls = []
        for pair in next_pairs:
            pictures = self.choices.pairs[pair]
            left = self.left(rater, pair)
            urls.append([self.url(pictures[left]), self.url(pictures[1 - left])])
            if len(urls) == 1:
                state.update(pair=pair, prompt=pictures[0]["prompt"], pictures=urls[0])
        return {**state, "ahead": list(itertools.chain.from_iterable(urls[1:]))}

    def url(self, picture):
        """The address of a picture. Its name does not say which picture it is."""
        path = picture["path"]
        if path not in self.served_paths:
            self.served_paths[path] = self.served / f"{secrets.token_hex(16)}{path.suffix}"
            shutil.copyfile(path, self.served_paths[path])
        return f"gradio_api/file={self.served_paths[path].as_posix()}"


def serve(page, host, login):
    """Shows the page until Ctrl+C or a signal to end. `login` is a name and a password, or `None`."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    import gradio

    def act(data):
        return page.act(data)

    # The default theme loads fonts from another server.
    theme = gradio.themes.Default(font="sans-serif", font_mono="monospace")
    with gradio.Blocks(title="Which is better?", analytics_enabled=False) as blocks:
        gradio.HTML(
            html_template=HTML, css_template=CSS, js_on_load=JS, apply_default_css=False, server_functions=[act]
        )

    def interrupt(*_):
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, interrupt)
    try:
        blocks.launch(
            server_name=host or "127.0.0.1",
            auth=login,
            allowed_paths=[str(page.served)],
            theme=theme,
            footer_links=[],
            quiet=True,
            prevent_thread_lock=True,
        )
        print(f"Rate on {blocks.local_url} and end with Ctrl+C, which writes the pairs.", flush=True)
        while True:
            time.sleep(1)
    except KeyboardInterrupt:
        blocks.close()


def write_choices(folder, choices):
    """
    Writes the pairs that raters chose, in place of those of an earlier `rate`, and report.md on how far raters agree. A pair
    whose picture was removed or replaced is left out. If no pair is left, the earlier ones and their report
    stay.
    """
    votes, pairs, num_changed = defaultdict(dict), [], 0
    for rater, chosen in choices.by_rater.items():
        for pair, label in chosen.items():
            if label is not None:
                votes[pair][rater] = label
    for key, labels in votes.items():
        pair = choices.pairs[key]
        if not is_there(pair) or any(digest_of_file(picture["path"]) != picture["digest"] for picture in pair):
            num_changed += 1
            continue
        share = statistics.mean(labels.values())
        columns = {"label_0": 0.5 if share == 0.5 else float(share > 0.5), "probability_0": share}
        pairs.append((*pair, {**columns, "raters": ", ".join(labels), "num_raters": len(labels)}))
    if num_changed:
        logger.warning(f"{num_changed} rated pairs are left out: a picture was removed or replaced")
    report = describe_agreement(choices.by_rater)
    written, _ = list_written(folder)
    if pairs:
        columns = {"probability_0": Value("float64"), "raters": Value("string"), "num_raters": Value("int64")}
        if warning := write_pairs(folder, pairs, columns, replaced=written):
            report += f"\nWarning: {warning}\n"
    elif written:
        logger.warning(f"No pair is left. The pairs and the report of an earlier rate stay in {folder}")
        return
    ties = sum(row["label_0"] == 0.5 for *_, row in pairs)
    report = f"{len(pairs) - ties:,} pairs with a winner and {ties:,} ties in {folder}\n\n{report}"
    with whole_file(folder / "report.md") as incomplete:
        incomplete.write_text(report, encoding="utf-8")
    print(report)


def describe_agreement(by_rater):
    """Markdown tables: what each rater did, and for each two how often they agree and Cohen's kappa (1960)."""
    lines = ["| rater | choices | ties | skips |", "|---|---|---|---|"]
    for rater, chosen in by_rater.items():
        counts = Counter(chosen.values())
        lines.append(f"| {rater} | {counts[0.0] + counts[1.0]:,} | {counts[0.5]:,} | {counts[None]:,} |")
    if len(by_rater) > 1:
        lines += ["", "| raters | pairs of both | agree | kappa |", "|---|---|---|---|"]
    for (rater, chosen), (other, chosen_by_other) in itertools.combinations(by_rater.items(), 2):
        both = [(chosen[pair], chosen_by_other.get(pair)) for pair in chosen]
        both = [labels for labels in both if None not in labels]
        if not both:
            lines.append(f"| {rater}, {other} | 0 | | |")
            continue
        agree = statistics.mean(first == second for first, second in both)
        counts = [Counter(labels) for labels in zip(*both)]
        chance = sum(counts[0][label] * counts[1][label] for label in counts[0]) / len(both) ** 2
        kappa = f"{(agree - chance) / (1 - chance):.2f}" if chance < 1 else ""
        lines.append(f"| {rater}, {other} | {len(both):,} | {agree:.0%} | {kappa} |")
    return "\n".join(lines) + "\n"


HTML = """
<form>
  <label>Your name <input name="rater" required maxlength="50" autocomplete="off"></label>
  <button>Start</button>
</form>
<section hidden>
  <p class="task">Click the better picture of</p>
  <h2></h2>
  <div class="pictures">
    <button data-action="left" aria-label="The left one is better"></button>
    <button data-action="right" aria-label="The right one is better"></button>
  </div>
  <div class="controls">
    <button data-action="left" class="side"><kbd>&larr;</kbd> Left</button>
    <button data-action="tie">Tie <kbd>space</kbd></button>
    <button data-action="undo">Undo <kbd>U</kbd></button>
    <button data-action="skip">Skip <kbd>S</kbd></button>
    <button data-action="right" class="side">Right <kbd>&rarr;</kbd></button>
  </div>
  <progress value="0"></progress>
  <p class="status"></p>
</section>
<p class="message" role="alert"></p>
"""
CSS = """
max-width: 1400px; margin: auto; text-align: center;
.task { margin: 0; }
h2 { font-size: 1.2rem; font-weight: bold; margin: 0 0 .5rem; overflow-wrap: anywhere; }
.pictures, .controls { display: flex; gap: .5rem; justify-content: center; }
.pictures button { flex: 1; border: 3px solid transparent; border-radius: 6px; }
.pictures button:hover { border-color: var(--color-accent); }
.pictures img { width: 100%; height: calc(100vh - 14.5rem); object-fit: contain; }
.controls { margin: .6rem 0; }
.controls button, form button, input { padding: .5rem 1rem; border: 1px solid gray; border-radius: 6px; background: none; }
kbd { opacity: .6; }
form { margin: 20vh auto; }
progress { width: 100%; accent-color: var(--color-accent); }
.status { opacity: .7; }
.message { color: #d00; font-weight: bold; }
@media (max-width: 640px) {
  .pictures { flex-direction: column; }
  .pictures img { height: calc(50vh - 8.25rem); }
  kbd, .side { display: none; }
}
"""
JS = """
const find = selector => element.querySelector(selector);
const keys = { ArrowLeft: "left", ArrowRight: "right", " ": "tie", u: "undo", s: "skip" };
let state = { pair: null }, loaded = {}, busy = false;
// The tab keeps its name when it is reloaded.
sessionStorage.tab ??= Math.random().toString(36).slice(2);

const call = action =>
  server.act({ rater: sessionStorage.rater, tab: sessionStorage.tab, action, pair: state.pair });
const load = urls => urls.forEach(url => { (loaded[url] ??= new Image()).src = url; });

async function act(action) {
  if (busy || !sessionStorage.rater) return;
  busy = true;
  try {
    const answer = await call(action);
    find(".message").textContent = answer.error ?? "";
    if (!answer.error) await show(answer);
  } catch (error) {
    find(".message").textContent = "Not saved: no answer from the server. Is it running? Choose again, or reload the page.";
  }
  busy = false;
}

async function show(answer) {
  state = answer;
  sessionStorage.rater = state.rater;
  load([...state.pictures, ...state.ahead]);
  const images = state.pictures.map(url => loaded[url]);
  // A pair can be chosen from only when both pictures are visible.
  await Promise.all(images.map(image => image.decode()));
  for (const url in loaded) if (![...state.pictures, ...state.ahead].includes(url)) delete loaded[url];
  element.querySelectorAll(".pictures button").forEach((button, side) => button.replaceChildren(...images.slice(side, side + 1)));
  find("h2").textContent = state.pair ? state.prompt : "All pairs are rated. Thank you!";
  find(".task").hidden = !state.pair;
  find("section").dataset.pair = state.pair ?? "";
  find("progress").max = state.total;
  find("progress").value = state.done;
  find(".status").textContent = `${state.rater}: ${state.status}`;
  find("form").hidden = true;
  find("section").hidden = false;
}

find("form").addEventListener("submit", event => {
  event.preventDefault();
  sessionStorage.rater = find("input").value;
  act("start");
});
element.querySelectorAll("[data-action]").forEach(button => button.addEventListener("click", () => {
  // The space key would press a button that has the focus.
  button.blur();
  act(button.dataset.action);
}));
document.addEventListener("keydown", event => {
  const action = keys[event.key.length === 1 ? event.key.toLowerCase() : event.key];
  if (!action || find("section").hidden || event.repeat || event.ctrlKey || event.metaKey || event.altKey) return;
  event.preventDefault();
  act(action);
});
setInterval(() => state.rater && call("ping").catch(() => {}), 5000);
if (sessionStorage.rater) act("start");
"""

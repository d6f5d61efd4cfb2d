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


"""The page of `eval_win_rate.py`: the result, and both sides' pictures of every prompt. It needs no other file but the pictures."""

from html import escape


STYLE = """
body { font-family: sans-serif; margin: 1.5rem auto; max-width: 1100px; padding: 0 1rem; }
h1 { font-size: 1.4rem; }
table { border-collapse: collapse; margin: 1rem 0; }
th, td { text-align: left; vertical-align: top; padding: .4rem .8rem .4rem 0; }
figure { margin: 0; }
figcaption { color: #555; font-size: .85rem; }
img { max-width: 100%; width: 384px; border: 4px solid transparent; border-radius: 4px; }
.winner img { border-color: #1a7f37; }
.winner figcaption::before { content: "winner: "; font-weight: bold; color: #1a7f37; }
"""
# Rows that are equal by the chosen margin stay in the order of the prompts.
SCRIPT = """
const rows = [...document.querySelectorAll("#prompts tbody tr")];
document.querySelector("select").addEventListener("change", event => {
  const [scorer, sign] = JSON.parse(event.target.value);
  const margin = row => scorer === null ? 0 : sign * JSON.parse(row.dataset.margins)[scorer];
  document.querySelector("#prompts tbody").append(...rows.toSorted((a, b) => margin(b) - margin(a)));
});
"""


def describe_page(sides, comparisons, rows):
    """
    A page of HTML.

    Args:
        sides (`dict`): what draws the pictures of each side, `{"model": words, "baseline": words}`.
        comparisons (`dict`): the `eval_win_rate.Comparison` of each scorer by name. The first one says who wins a prompt.
        rows (`list`): for each prompt the prompt, `{side: address of the picture}` and `{scorer: {side: score}}`.

    Returns:
        `str`: the page.
    """
    (first, result), *_ = comparisons.items()
    headline = f"The model wins {result.win_rate:.1%} by {first} (95 %: {result.low:.1%} – {result.high:.1%})"
    results = "".join(
        f"<tr><td>{escape(name)}<td>{c.win_rate:.1%}<td>{c.low:.1%} – {c.high:.1%}" for name, c in comparisons.items()
    )
    options = '<option value="[null, 0]">in the order of the prompts'
    for index, name in enumerate(comparisons):
        for side, sign in (("model", 1), ("baseline", -1)):
            options += f'<option value="[{index}, {sign}]">by {escape(name)}, largest wins of the {side} first'
    described = "".join(f"<tr><th>{side}<td>{escape(words)}" for side, words in sides.items())
    return f"""<!doctype html>
<html lang="en"><meta charset="utf-8"><title>Win rate</title><style>{STYLE}</style>
<h1>{escape(headline)}</h1>
<table>{described}</table>
<table><tr><th>scorer<th>win rate of the model<th>95 % interval{results}</table>
<p>A green frame marks the better picture by {escape(first)}. A tie has none, and counts one half.</p>
<label>Order: <select>{options}</select></label>
<table id="prompts"><thead><tr><th>prompt{"".join(f"<th>{side}" for side in sides)}</thead>
<tbody>{"".join(describe_row(sides, first, *row) for row in rows)}</tbody></table>
<script>{SCRIPT}</script></html>
"""


def describe_row(sides, first, prompt, addresses, scores):
    """A row of the table: a prompt and the pictures of both sides, with the winner's in a frame."""
    margins = [values["model"] - values["baseline"] for values in scores.values()]
    cells = ""
    for side in sides:
        is_winner = scores[first][side] > min(scores[first].values())
        caption = ", ".join(f"{name} {values[side]:.4g}" for name, values in scores.items())
        cells += f"""<td><figure{' class="winner"' if is_winner else ""}><img src="{addresses[side]}" alt="{side}" loading="lazy">"""
        cells += f"<figcaption>{escape(caption)}</figcaption></figure>"
    return f'<tr data-margins="{margins}"><td>{escape(prompt)}{cells}\n'

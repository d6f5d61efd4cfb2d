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


"""Keeps a measured table between two markers of a Markdown file, so that each number is typed by the program that measures it.

<!-- small-world: written by python small_world/report.py -->
| method | reward |
| --- | --- |
<!-- end small-world -->
"""


def write_table(file, name, command, table, check=False):
    """
    Replaces the text between the markers of a table.

    Args:
        file (`pathlib.Path`): a Markdown file.
        name (`str`): the table's name in both markers.
        command (`str`): what writes the table, as the first marker says.
        table (`str`): the new text.
        check (`bool`): only compare, and leave the file as it is.

    Returns:
        `bool`: whether the file already held the table.

    Raises:
        ValueError: if the file does not have both markers.
    """
    start, end = f"<!-- {name}: written by {command} -->\n", f"<!-- end {name} -->"
    before, has_start, rest = file.read_text(encoding="utf-8").partition(start)
    old, has_end, after = rest.partition(end)
    if not (has_start and has_end):
        raise ValueError(f"{file} must have the line {start.strip()} and, after the table, the line {end}.")
    new = table.strip("\n") + "\n"
    if not check:
        file.write_text(before + start + new + end + after, encoding="utf-8")
    return old == new

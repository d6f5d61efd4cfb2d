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

import doc_tables
import pytest


COMMAND = "python measure.py"
START, END = "<!-- costs: written by python measure.py -->", "<!-- end costs -->"
TABLE = "| a | b |\n| --- | --- |\n| −1 | β |"


@pytest.fixture
def page(tmp_path):
    file = tmp_path / "page.md"
    file.write_text(f"Before\n\n{START}\nold\n{END}\n\nAfter\n<!-- end other -->\n", encoding="utf-8")
    return file


def test_the_text_between_the_markers_is_replaced(page):
    assert not doc_tables.write_table(page, "costs", COMMAND, TABLE)
    expected = f"Before\n\n{START}\n{TABLE}\n{END}\n\nAfter\n<!-- end other -->\n"
    assert page.read_text(encoding="utf-8") == expected
    assert doc_tables.write_table(page, "costs", COMMAND, TABLE)
    assert page.read_text(encoding="utf-8") == expected


def test_a_check_changes_nothing(page):
    before = page.read_bytes()
    assert not doc_tables.write_table(page, "costs", COMMAND, TABLE, check=True)
    assert page.read_bytes() == before
    assert doc_tables.write_table(page, "costs", COMMAND, "old", check=True)


@pytest.mark.bad_input
@pytest.mark.parametrize(
    "content",
    ["", f"{START}\n{TABLE}\n", f"{TABLE}\n{END}\n", f"{END}\n{START}\n", f"{START.replace('py', 'sh')}\n{END}\n"],
)
def test_a_file_without_both_markers_is_refused(tmp_path, content):
    file = tmp_path / "page.md"
    file.write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match=rf"{file} .*{START}.*{END}"):
        doc_tables.write_table(file, "costs", COMMAND, TABLE)
    assert file.read_text(encoding="utf-8") == content

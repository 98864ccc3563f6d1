"""Text files as editors on any system write them."""

from pathlib import Path

import pytest

from flashdiff.distill.sources import _prompts
from flashdiff.evaluation.images import read_prompts

PROMPTS = ["a red dog", "a dog\u2028that is one line", "a blue dog"]


@pytest.mark.parametrize("start", [b"", b"\xef\xbb\xbf"], ids=["plain", "byte order mark"])
@pytest.mark.parametrize("end", ["\n", "\r\n"], ids=["LF", "CRLF"])
def test_prompts_are_the_lines_of_a_file_and_nothing_else(tmp_path: Path, start: bytes, end: str) -> None:
    file = tmp_path / "prompts.txt"
    file.write_bytes(start + end.join([PROMPTS[0], "", *PROMPTS[1:], "  "]).encode())
    assert [prompt.text for prompt in read_prompts(str(file), 10)] == PROMPTS
    assert [sample.caption for sample in _prompts(file)] == PROMPTS

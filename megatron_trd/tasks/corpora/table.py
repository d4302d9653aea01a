"""The corpora that `tools/prepare_data.py` knows: where they are, under which licence, how their records are read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from megatron_trd.tasks.corpora.mathematics import amo_row, math_row
from megatron_trd.tasks.corpora.programs import apps_row, assert_row, evalplus_row, livecodebench_row
from megatron_trd.tasks.corpora.records import Record
from megatron_trd.tasks.corpus import Row

UNKNOWN = "see its source"


@dataclass(frozen=True, slots=True, kw_only=True)
class Corpus:
    """One corpus."""

    row: Callable[[Record, str], Row]
    """From a record and the prefix of ids."""
    hub: str | None = None
    """Data set on the Hugging Face hub; None = it is not there in this form."""
    files: tuple[str, ...] = ("*.jsonl", "*.json", "*.parquet")
    """Files of the data set, in any folder of it."""
    size: int | None = None
    """Problems it must have."""
    licence: str = UNKNOWN
    """As the publisher states it; statements of competitions stay their owners'."""


_LIVECODEBENCH = "livecodebench/code_generation_lite"

CORPORA: dict[str, Corpus] = {
    "deepscaler": Corpus(row=math_row, hub="agentica-org/DeepScaleR-Preview-Dataset", licence="MIT"),
    "aime24": Corpus(row=math_row, hub="math-ai/aime24", size=30),
    "aime25": Corpus(row=math_row, hub="math-ai/aime25", size=30, licence="Apache-2.0; problems: MAA"),
    "hmmt25_feb": Corpus(row=math_row, hub="MathArena/hmmt_feb_2025", size=30),
    "hmmt25_nov": Corpus(row=math_row, hub="MathArena/hmmt_nov_2025", size=30),
    "beyondaime": Corpus(row=math_row, hub="ByteDance-Seed/BeyondAIME", size=100),
    "amo_bench": Corpus(row=amo_row, hub="meituan-longcat/AMO-Bench", size=39, licence="MIT"),
    "math500": Corpus(row=math_row, hub="HuggingFaceH4/MATH-500", size=500, licence="MIT"),
    "math": Corpus(row=math_row),
    "taco": Corpus(row=apps_row, hub="BAAI/TACO", files=("ALL/train-*.parquet",), licence="Apache-2.0 and others"),
    "apps": Corpus(row=apps_row, hub="codeparrot/apps", files=("train.jsonl",), licence="MIT"),
    "livecodebench_release_v6": Corpus(row=livecodebench_row, hub=_LIVECODEBENCH, files=("test*.jsonl",), size=1055),
    "livecodebench_v6": Corpus(row=livecodebench_row, hub=_LIVECODEBENCH, files=("test6.jsonl",), size=175),
    "humaneval_plus": Corpus(row=evalplus_row, size=164, licence="Apache-2.0"),
    "mbpp_plus": Corpus(row=evalplus_row, size=378, licence="Apache-2.0"),
    "mbpp": Corpus(row=assert_row, hub="google-research-datasets/mbpp", files=("full/*.parquet",), licence="CC-BY-4.0"),
    "leetcode": Corpus(row=assert_row),
}
"""`math`: any file with `problem` and `answer`; `apps`: any with `question` and `input_output`."""

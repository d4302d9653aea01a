#!/usr/bin/env bash
# Fetch TACO and the benchmarks from the Hugging Face hub into DATA. Needs huggingface_hub and pyarrow.
# shellcheck source-path=SCRIPTDIR source=../common.sh
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"
prepare taco "humaneval_plus mbpp_plus livecodebench_v6" "$@"

#!/usr/bin/env bash
# Fetch DeepScaleR and the benchmarks from the Hugging Face hub into DATA. Needs huggingface_hub and pyarrow.
# shellcheck source-path=SCRIPTDIR source=../common.sh
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"
prepare deepscaler "aime24 aime25 hmmt25_feb beyondaime amo_bench" "$@"

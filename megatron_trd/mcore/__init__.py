"""The Megatron embassy: the only room that imports `megatron`."""

import logging
import warnings

from megatron_trd.mcore.packages import refuse_impostors

# Said at import on every machine without apex or Transformer Engine; what we use instead is our choice, not a fallback.
warnings.filterwarnings("ignore", message=r".*Apex (is|are) not installed.*")
warnings.filterwarnings("ignore", message=r".*Transformer Engine and Apex are not installed.*")
# Megatron 0.16 calls collectives by names that torch 2.13 renamed.
warnings.filterwarnings("ignore", message=r".*torch\.distributed\.\w+_tensor` is deprecated.*")
warnings.filterwarnings("ignore", message=r".*full scope is deprecated.*")
# It announces itself at warning level; it is off.
logging.getLogger("megatron.core.rerun_state_machine").setLevel(logging.ERROR)

refuse_impostors()

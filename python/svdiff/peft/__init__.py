"""SVDiff as a PEFT method: importing this registers it, and then `peft.get_peft_model` and all around it take it.

Example::

    import svdiff.peft
    from peft import PeftModel, get_peft_model

    model = get_peft_model(model, svdiff.peft.SVDiffConfig(task_type="CAUSAL_LM"))
    model.save_pretrained("my-adapter")  # adapter_config.json, adapter_model.safetensors
    PeftModel.from_pretrained(base, "my-adapter")  # wherever svdiff.peft was imported

PEFT's registry has no entry points: without the import a folder of ours is an unknown method to it.
"""

from svdiff_kernels import SVDiffError

try:
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
    from peft.tuners.tuners_utils import BaseTuner
except ModuleNotFoundError as error:
    if (error.name or "").partition(".")[0] != "peft":
        raise
    raise SVDiffError('svdiff.peft needs PEFT: pip install "svdiff-kernels[peft]"') from error
if not hasattr(BaseTuner, "_get_adapter_state_dict"):  # before, PEFT listed in its own code which methods it saves
    raise SVDiffError('svdiff.peft needs PEFT 0.21 or newer: pip install -U "peft>=0.21"')

from .config import SVDiffConfig, SVDiffType
from .layer import SVDiffLayer
from .model import SVDiffModel

__all__ = ["SVDiffConfig", "SVDiffLayer", "SVDiffModel", "SVDiffType"]

# By hand: `peft.utils.register_peft_method` takes no names but those of PEFT's own enum, which is left as it is.
if PEFT_TYPE_TO_CONFIG_MAPPING.setdefault(SVDiffType.SVDIFF, SVDiffConfig) is not SVDiffConfig:
    raise SVDiffError("PEFT has another method named SVDIFF: svdiff.peft cannot be used beside it")
PEFT_TYPE_TO_TUNER_MAPPING[SVDiffType.SVDIFF] = SVDiffModel
PEFT_TYPE_TO_PREFIX_MAPPING[SVDiffType.SVDIFF] = SVDiffModel.prefix

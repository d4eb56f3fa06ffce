"""The Hugging Face side of Oryx: the stand-alone model for transformers 5 and the two-way conversion.

`configuration_oryx.py` and `modeling_oryx.py` import nothing of this package: an export copies them beside the weights,
and `AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)` needs torch and transformers alone.
"""

import oryx_megatron.platform  # noqa: F401 - before megatron-core: it puts off what that loads in vain

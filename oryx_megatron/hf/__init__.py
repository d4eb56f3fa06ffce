"""The Hugging Face side of Oryx: the stand-alone model for transformers 5 and the two-way conversion.

`configuration_oryx.py`, `modeling_oryx.py` and `recurrences_oryx.py` import nothing else of this package: an export
copies them beside the weights, and `AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)` needs torch
and transformers alone. `recurrences_oryx.py` needs torch alone; `ops/` computes with it too.
"""

import oryx_megatron.platform  # noqa: F401 - before megatron-core: it puts off what that loads in vain

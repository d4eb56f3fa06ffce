"""The Hugging Face side of Oryx: the stand-alone model for transformers 5 and the two-way conversion.

`*_oryx.py` import nothing else of this package: an export copies them beside the weights, and
`AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)` needs torch and transformers alone. Of them
`plans_oryx.py` is pure Python; `modes_oryx.py`, `recurrences_oryx.py` and `states_oryx.py` need torch alone. Training
uses plans, recurrences and states too: there is one copy of each. This file imports nothing, so configs load no torch.
"""

"""The Hugging Face side of Oryx: the stand-alone model for transformers 5 and the two-way conversion.

`*_oryx.py` import nothing else of this package: an export copies them beside the weights, and
`AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)` needs torch and transformers alone. Some need
less, and training uses those too, so that there is one copy of each: docs/architecture.md lists them. This file imports
nothing, so configs load no torch.
"""

"""Hugging Face checkpoints in and out.

model, tokenizer = lcr.load_pretrained("path/to/folder")
lcr.save_pretrained(model, "another/folder", tokenizer=tokenizer)
"""

from lcr.pretrained.api import load_pretrained as load_pretrained
from lcr.pretrained.api import save_pretrained as save_pretrained

"""How the embedded base and the picture checker were made: `python -m finetune.demo.build`. Nothing else uses this."""

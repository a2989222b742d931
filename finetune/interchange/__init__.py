"""Adapter files of every make: look into them, convert, merge, resize, extract and compare.

Two halves. `header`, `names`, `layouts` and `inspection` know files and spellings and import neither torch nor
diffusers, so that `finetune inspect` answers at once; `adapter` and everything above it compute.

    header -> layouts -> inspection                    (numpy)
    header -> layouts -> reading -> Adapter -> writing (torch)
                                    Adapter -> merging, resizing, comparing
                         two models -> extraction -> Adapter
"""

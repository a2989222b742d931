"""From a folder of pictures to a dataset that can be trusted: checked, captioned, bucketed, with a manifest.

Knows nothing of models and imports nothing of `finetune`. The route of a picture: `folder.list_folder` finds
it, `images.decode` makes pixels of it, `scan.scan` turns it into an `ImageRecord` with captions from
`captioners.CAPTIONERS`, `manifest.write` stores all records as an imagefolder that the `datasets` library
also loads, and `buckets.assign` says how it is resized and cropped. Nothing is dropped in silence: every
other file is named in a `Problem`.
"""

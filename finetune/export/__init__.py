"""From a trained adapter to files that load everywhere, each proven by reading it back.

    run -> exporting (a table of formats) -> adapter, merged, embeddings -> verify (by way of readers)
    card, gallery, sidecars, manifest: what lies beside the files
    publish: all of it to the hub
"""

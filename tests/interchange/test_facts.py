"""Facts that two places need say the same in both: families and the tables of names."""

from __future__ import annotations

import pytest

from finetune.families import FAMILIES
from finetune.interchange.names import published


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_tables_of_names_agree_with_the_families(name):
    """A prefix or an id that differs would make a file that export writes one that conversion cannot place."""
    family = FAMILIES[name]
    tables = [table for table in published() if table.family == name]
    assert tables
    for table in tables:
        assert table.denoiser == family.denoiser
        assert set(table.networks) == {family.denoiser, *family.text_encoders}
        for component, network in table.networks.items():
            key = "denoiser" if component == family.denoiser else component
            assert network.kohya[0] == family.kohya_prefixes[key], component
        assert table.kohya_versions[0] == family.kohya_base_version
    assert family.modelspec_architecture in {spec for table in tables for spec in table.modelspec}


def test_every_table_is_of_a_family():
    """A table nobody asks for would be judged by nobody."""
    assert {table.family for table in published()} == set(FAMILIES)

# Copyright Contributors to the numpyro_smcopt project.
# SPDX-License-Identifier: Apache-2.0
"""The pages show what their programs print and draw, and the reference knows every public name."""

import re

import matplotlib
import pages
import pytest

import numpyro_smcopt

matplotlib.use("Agg")  # figures go to files, so no display is needed
PROGRAMS = [page for page in pages.all_pages() if pages.has_program(page)]


@pytest.mark.slow
@pytest.mark.parametrize("page", PROGRAMS, ids=lambda page: page.stem)
def test_page_shows_what_its_program_prints_and_draws(page):
    text, pictures = pages.run(page)
    assert pages.disagreement(page.read_text(), text) is None
    for picture in pages.pictures_shown(page):
        assert (pages.PICTURES / picture).exists()
        assert picture in pictures, f"{picture} is shown, but the page's program does not save it"


def test_there_are_pages_with_programs():
    assert {"README", "quickstart", "extending"} <= {page.stem for page in PROGRAMS}


@pytest.mark.parametrize(
    "printed, complaint",
    [
        ("mean 3.29, 95% in 2.5 to  4.1", None),
        ("mean 3.30, 95% in 2.5 to 4.1", None),  # one in the last digit
        ("mean 3.29, 95% in 2.4 to 4.1", None),  # likewise
        ("mean 3.40, 95% in 2.5 to 4.1", "3.40"),
        ("mean 3.29, 95% in 2.5 to 4.5", "4.5"),
        ("mean 3.29, 95% in 2.5 and 4.1", "and"),
        ("mean 3.29", "instead of"),
        ("mean nan, 95% in 2.5 to 4.1", "nan"),
    ],
)
def test_outputs_are_compared_number_by_number(printed, complaint):
    found = pages.disagreement("mean 3.29, 95% in 2.5 to 4.1", printed)
    assert found is None if complaint is None else complaint in found


def test_every_public_name_is_in_the_reference():
    text = (pages.ROOT / "docs" / "reference" / "api.md").read_text()
    described = set(re.findall(r"\.\. auto\w+:: numpyro_smcopt\.(\w+)", text))
    assert set(numpyro_smcopt.__all__) - described == set()

"""Messages of errors hide credentials and leave everything else as it is."""

from __future__ import annotations

import pickle

import pytest

from moleblend_ray.errors import DataError, without_credentials


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("s3://key:secret@bucket/x", "s3://***@bucket/x"),
        ("s3://bucket/x@2 and a?b", "s3://bucket/x@2 and a?b"),
        ("Cannot read https://h/a?sig=x%2F: gone.", "Cannot read https://h/a?sig=***: gone."),
        (
            "url=URL('https://h/a?part=1&Signature=x')",
            "url=URL('https://h/a?part=1&Signature=***')",
        ),
        (
            "https://h/a?X-Amz-Date=1&X-Amz-Credential=AKIA/1&id=7&Expires=3, https://h/b",
            "https://h/a?X-Amz-Date=***&X-Amz-Credential=***&id=7&Expires=***, https://h/b",
        ),
    ],
)
def test_credentials_are_hidden_and_nothing_else(text: str, shown: str) -> None:
    assert without_credentials(text) == shown
    assert without_credentials(shown) == shown


def test_an_error_hides_credentials_also_after_a_journey_between_processes() -> None:
    error = DataError("https://me:pw@h/x is damaged")
    assert str(pickle.loads(pickle.dumps(error))) == "https://***@h/x is damaged"

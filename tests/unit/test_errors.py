"""Messages of errors hide credentials and leave everything else as it is."""

from __future__ import annotations

import pickle

import pytest

from moleblend_ray.config.submit import SubmitConfig
from moleblend_ray.errors import ConfigError, DataError, without_credentials
from moleblend_ray.orchestration.progress.logs import Redactor


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("s3://key:secret@bucket/x", "s3://***@bucket/x"),
        ("s3://bucket/x@2 and a?b", "s3://bucket/x@2 and a?b"),
        ("http://h:8080/x@2 and host:1/a@b", "http://h:8080/x@2 and host:1/a@b"),
        ("https://u:P@ss@h/x is", "https://***@h/x is"),
        ("https://u:P@s@h/x,https://v:q@i/y", "https://***@h/x,https://***@i/y"),
        ("s3://AKIA:SEC/R+ET@bucket/p", "s3://***@bucket/p"),
        ("s3://k:a/b@c@host/x", "s3://***@host/x"),
        ("http://[::1]:8265/a@b", "http://[::1]:8265/a@b"),
        ('["https://a.com","me@x.org"]', '["https://a.com","me@x.org"]'),
        ("https://h/a?auth=x&author=y&pwd=z", "https://h/a?auth=***&author=y&pwd=***"),
        ("https://h/a#access_token=x", "https://h/a#access_token=***"),
        ("Cannot read https://h/a?sig=x%2F: gone.", "Cannot read https://h/a?sig=***: gone."),
        (
            "url=URL('https://h/a?part=1&Signature=x')",
            "url=URL('https://h/a?part=1&Signature=***')",
        ),
        (
            "https://h/a?X-Amz-Date=1&X-Amz-Credential=AKIA/1&id=7&Expires=3, https://h/b",
            "https://h/a?X-Amz-Date=***&X-Amz-Credential=***&id=7&Expires=***, https://h/b",
        ),
        (
            "gs://h/a?X-Goog-Date=1&X-Goog-Algorithm=2",
            "gs://h/a?X-Goog-Date=***&X-Goog-Algorithm=***",
        ),
        (
            "https://a.blob.core.windows.net/x?sv=1&st=2&se=3&sp=r&sr=c&sig=y",
            "https://a.blob.core.windows.net/x?sv=***&st=***&se=***&sp=***&sr=c&sig=***",
        ),
    ],
)
def test_credentials_are_hidden_and_nothing_else(text: str, shown: str) -> None:
    assert without_credentials(text) == shown
    assert without_credentials(shown) == shown


def test_an_error_hides_credentials_also_after_a_journey_between_processes() -> None:
    error = DataError("https://me:pw@h/x is damaged")
    assert str(pickle.loads(pickle.dumps(error))) == "https://***@h/x is damaged"


@pytest.mark.parametrize(
    "name",
    [
        "AWS_SECRET_ACCESS_KEY",
        "AZURE_STORAGE_KEY",
        "AZURE_STORAGE_ACCOUNT_KEY",
        "AZURE_STORAGE_CONNECTION_STRING",
        "HF_PRIVATE_KEY",
        "STRIPE_KEY",
        "PGPASS",
        "SSH_PASSPHRASE",
        "NETRC_AUTH",
        "AUTHORIZATION",
        "WANDB_API_KEY",
        "OPENAI_API_KEYS",
        "AWS_ACCESSKEYID",
        "API_KEY2",
        "DB_PWD",
        "GCP_CREDENTIALS",
        "URL_SIGNATURE",
        "session_cookie",
    ],
)
def test_a_variable_that_holds_a_secret_is_neither_sent_nor_shown(name: str) -> None:
    with pytest.raises(ConfigError, match=f"{name} looks like a secret"):
        SubmitConfig(job="data", env=(f"{name}=x",))
    assert Redactor({name: "abcdefgh12"})("it is abcdefgh12") == "it is ***"


@pytest.mark.parametrize(
    "name", ["KEYBOARD", "MONKEY", "AUTHOR", "COMPASS", "PWD", "OLDPWD", "S3_KEY_PREFIX"]
)
def test_other_variables_are_no_secrets(name: str) -> None:
    SubmitConfig(job="data", env=(f"{name}=x",))
    assert Redactor({name: "abcdefgh12"})("it is abcdefgh12") == "it is abcdefgh12"

"""Data sets on the Hugging Face Hub: whole, or one file of them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from enc2gen.corpora.formats import Record
from enc2gen.errors import DataError


def hub_records(name: str, config: str | None, split: str) -> Iterator[Record]:
    """Records of one split of a data set on the Hub.

    Raises:
        DataError: the Hub cannot be reached, or the data set cannot be read.
    """
    import datasets

    where = f"Hub dataset {name}"
    local = f"; if a file or folder {name} was meant: there is none"
    try:
        yield from datasets.load_dataset(name, config, split=split, streaming=True)
    except ConnectionError as error:
        raise _unreachable(name, error, local) from error
    except datasets.exceptions.DatasetNotFoundError as error:
        raise _not_found(name, local) from error
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        if "scripts are no longer supported" in str(error):
            raise DataError(
                "it is a Python script, which no longer runs",
                where=where,
                remedy=f"`hf download --repo-type dataset --revision refs/convert/parquet {name} --local-dir DIR` "
                "fetches the Hub's own copy of its data; give a .parquet file below DIR as the source",
            ) from error
        raise DataError(
            f"cannot be read: {error}",
            where=where,
            remedy="check the configuration (owner/name:config) and the split on the dataset's page",
        ) from error


def hub_file(name: str, file: str) -> Path:
    """The local copy of one file of a data set on the Hub, downloaded once.

    Raises:
        DataError: the Hub cannot be reached, or has no such file.
    """
    from huggingface_hub import errors, hf_hub_download

    try:
        return Path(hf_hub_download(name, file, repo_type="dataset"))
    except errors.RepositoryNotFoundError as error:  # gated ones, too
        raise _not_found(name) from error
    except errors.LocalEntryNotFoundError as error:
        raise _unreachable(name, error) from error
    except errors.EntryNotFoundError as error:
        raise DataError(
            f"the data set has no file {file}",
            where=f"Hub dataset {name}",
            remedy=f"see https://huggingface.co/datasets/{name}/tree/main",
        ) from error
    except (OSError, ValueError) as error:
        raise _unreachable(name, error) from error


def _unreachable(name: str, error: Exception, hint: str = "") -> DataError:
    return DataError(
        f"the Hugging Face Hub cannot be reached: {error}",
        where=f"Hub dataset {name}",
        remedy="check the network and that HF_HUB_OFFLINE is not set; or, where there is a network, run "
        f"`hf download --repo-type dataset {name} --local-dir DIR` and give the folder DIR as the source" + hint,
    )


def _not_found(name: str, hint: str = "") -> DataError:
    return DataError(
        "no such dataset, or it is private",
        where=f"Hub dataset {name}",
        remedy="check the name on https://huggingface.co/datasets; if it is private or gated, run "
        "`hf auth login`" + hint,
    )

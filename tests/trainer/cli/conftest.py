"""The datasets of the tests of `data_pipeline`, for those of its command line."""

from tests.data_pipeline.conftest import dataset, jpeg, write_records

__all__ = ["dataset", "jpeg", "write_records"]

"""Configuration: the tree of keys, YAML files and overrides, and the geometric conventions that a model follows."""

from fastrcnn.config.conventions import Conventions, conventions_of
from fastrcnn.config.loading import ConfigError, check_config, dump_config, find_config, load_config
from fastrcnn.config.schema import Config

cfg = Config()  # maskrcnn-benchmark's global, which its scripts fill with merge_from_file and merge_from_list

__all__ = [
    "Config",
    "ConfigError",
    "Conventions",
    "cfg",
    "check_config",
    "conventions_of",
    "dump_config",
    "find_config",
    "load_config",
]

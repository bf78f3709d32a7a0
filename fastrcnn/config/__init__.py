"""Configuration: the tree of keys, YAML files and overrides, and the geometric conventions that a model follows."""

from fastrcnn.config.conventions import Conventions, conventions_of
from fastrcnn.config.loading import ConfigError, check_config, dump_config, load_config
from fastrcnn.config.schema import Config

__all__ = ["Config", "ConfigError", "Conventions", "check_config", "conventions_of", "dump_config", "load_config"]

"""The version of the library, which stands without an installation too."""

VERSION = "0.1.0"

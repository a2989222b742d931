"""The version of this toolkit, for everything that says what wrote it."""

VERSION = "0.1.0"

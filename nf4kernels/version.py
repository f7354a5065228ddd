"""The version of this package, which the tables of measurements name as well."""

VERSION = "0.1.0"

"""Checks of a scan and its label before conversion, and the pages and tables that report them."""

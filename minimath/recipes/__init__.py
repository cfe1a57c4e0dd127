"""Recipes shipped with minimath (YAML files)."""

"""Importing this registers pyrl's losses with verl: VERL_USE_EXTERNAL_MODULES names it."""

from pyrl.integrations.verl import register

register()

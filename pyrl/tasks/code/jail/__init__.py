"""The program that runs programs: `python pyrl/tasks/code/jail`, standard library only.

`pyrl.tasks.code.sandbox` starts it without `pyrl` on its path, so that it starts in milliseconds.
"""

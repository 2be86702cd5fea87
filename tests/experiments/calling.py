"""The programs of `experiments`, called as from a shell but in this process."""

import logging
import runpy
import sys

import pytest
from absl import flags


def call_program(program, *arguments):
    """The exit code; leaves flags, logging and arguments as they were."""
    script = f"experiments/{program}.py"
    imported = programs_flags()  # of programs that other tests imported: two programs share names
    for name in imported:
        delattr(flags.FLAGS, name)
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [script, *arguments])
        try:
            runpy.run_module(f"experiments.{program}", run_name="__main__", alter_sys=True)
            raise AssertionError("a program ends by sys.exit")
        except SystemExit as end:
            return end.code or 0
        finally:
            root.handlers[:] = handlers
            root.setLevel(level)
            for name in list(flags.FLAGS):
                if flags.FLAGS.find_module_defining_flag(name).endswith(script):
                    delattr(flags.FLAGS, name)
            for name, (flag, module) in imported.items():
                flags.DEFINE_flag(flag, module_name=module)
            flags.FLAGS.unparse_flags()


def programs_flags():
    """{name: (flag, module)} of the flags that modules of `experiments` have defined in this process."""
    defined = {name: flags.FLAGS.find_module_defining_flag(name) for name in flags.FLAGS}
    return {name: (flags.FLAGS[name], m) for name, m in defined.items() if str(m).startswith("experiments.")}

"""What becomes of errors at the end of a command."""
import io
import subprocess
import sys

import pytest
import torch

from minimath.core.entry import run_command
from minimath.core.errors import UserError


@pytest.mark.parametrize("error, said", [
    (UserError("no such file"), "error: no such file"),
    (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
     "error: out of memory (CUDA out of memory): try quant=nf4, a lower max_num_seqs"),
    (MemoryError(), "error: out of memory (of the CPU): try quant=nf4"),
    (RuntimeError("[enforce fail at alloc_cpu.cpp:121] data. DefaultCPUAllocator: can't allocate memory: you tried to "
                  "allocate 9 bytes. Error code 12 (Cannot allocate memory)\nException raised from alloc_cpu"),
     "error: out of memory (DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes): try"),
    (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`\nCUDA kernel errors"),
     "error: out of memory (CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`): try"),
    (PermissionError(13, "Permission denied", "/root/run"), "error: /root/run: Permission denied; choose another"),
    (OSError(36, "File name too long", "x"), "error: x: File name too long"),
    (NotADirectoryError(20, "Not a directory", "x/plots"), "error: x/plots: Not a directory; choose another")])
def test_what_a_user_can_put_right_is_one_line_and_a_status(capsys, error, said):
    def action():
        raise error
    assert run_command(action) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith(said)


def test_other_errors_keep_their_traceback():
    with pytest.raises(RuntimeError, match="illegal memory access"):
        run_command(lambda: (_ for _ in ()).throw(RuntimeError("CUDA error: an illegal memory access was encountered")))


def test_a_missing_file_that_nobody_expected_keeps_its_traceback():
    with pytest.raises(FileNotFoundError):
        run_command(lambda: open("/missing/file"))


def test_what_a_model_wrote_does_not_stop_a_command_on_an_ascii_terminal(monkeypatch):
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii"))
    assert run_command(lambda: print("5 \u00d7 3")) == 0 and raw.getvalue() == b"5 ? 3\n"


def test_a_reader_that_has_left_is_no_traceback():
    program = [sys.executable, "-c", "import sys, minimath.cli; sys.stdin.read(); sys.exit(minimath.cli.main())"]
    child = subprocess.Popen(program, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    child.stdout.close()
    _, error = child.communicate()
    assert (child.returncode, error) == (1, b"")

"""Processes that encode text: what is sent to all processes at once is for the main one to decide on."""

import multiprocessing
import os
import signal
import time

from tvq_pod.data.workers import main_left_alone, signals_kept


def test_ctrl_c_hang_up_and_usr1_do_not_end_the_processes_that_encode():
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [])
    with main_left_alone(), signals_kept():
        process = multiprocessing.get_context("spawn").Process(target=time.sleep, args=[0.1])
        process.start()
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):
        os.kill(process.pid, number)
    process.join()
    assert process.exitcode == 0
    assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == before

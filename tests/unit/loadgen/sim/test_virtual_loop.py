"""Virtual time: exact, deterministic, and honest about what it cannot do."""

from __future__ import annotations

import asyncio
import random
import socket
import threading
import time

import pytest

from loadgen.sim.virtual_loop import DeadlockError, HorizonError, VirtualLoop, VirtualTimeError, run_virtual


def test_an_hour_of_sleep_takes_no_time() -> None:
    async def main() -> float:
        loop = asyncio.get_running_loop()
        await asyncio.sleep(3600)
        return loop.time()

    before = time.process_time()
    assert run_virtual(main()) == 3600.0
    assert time.process_time() - before < 5


def test_timers_fire_at_their_exact_instants_in_order() -> None:
    rng = random.Random(3)
    instants = sorted(rng.uniform(0, 1e6) for _ in range(500))
    fired: list[tuple[float, float]] = []

    async def main() -> None:
        loop = asyncio.get_running_loop()

        def fire(instant: float) -> None:
            fired.append((instant, loop.time()))

        for instant in rng.sample(instants, len(instants)):
            loop.call_at(instant, fire, instant)
        await asyncio.sleep(1e6 + 1)

    run_virtual(main())
    assert fired == [(instant, instant) for instant in instants]


def test_the_same_program_takes_the_same_steps_twice() -> None:
    def trace() -> list[tuple[float, int]]:
        steps: list[tuple[float, int]] = []

        async def worker(index: int, queue: asyncio.Queue[int], rng: random.Random) -> None:
            for _ in range(20):
                await asyncio.sleep(rng.choice([0.0, 0.1, 0.1, 0.25]))
                await queue.put(index)
                steps.append((asyncio.get_running_loop().time(), await queue.get()))

        async def main() -> None:
            queue: asyncio.Queue[int] = asyncio.Queue(maxsize=3)
            rng = random.Random(11)
            async with asyncio.TaskGroup() as group:
                for index in range(10):
                    group.create_task(worker(index, queue, rng))

        run_virtual(main())
        return steps

    first = trace()
    assert len(first) == 200
    assert first == trace()


def test_a_deadlock_names_who_waits_and_where() -> None:
    async def waits_for_nothing() -> None:
        await asyncio.Event().wait()

    async def main() -> None:
        await asyncio.sleep(2)
        async with asyncio.TaskGroup() as group:
            group.create_task(waits_for_nothing(), name="the edge")

    with pytest.raises(DeadlockError) as caught:
        run_virtual(main())
    assert caught.value.now_s == 2.0
    assert any(line.startswith("the edge at ") for line in caught.value.waiting)
    assert "2.000000 s" in str(caught.value)


def test_a_horizon_ends_a_run_that_timers_keep_alive() -> None:
    async def heartbeat() -> None:
        while True:
            await asyncio.sleep(1)

    async def main() -> None:
        beats = asyncio.create_task(heartbeat(), name="heartbeat")
        await asyncio.Event().wait()
        beats.cancel()

    with pytest.raises(HorizonError) as caught:
        run_virtual(main(), horizon_s=30)
    assert any(line.startswith("heartbeat") for line in caught.value.waiting)


def test_threads_are_refused_with_the_function_named() -> None:
    def invoke() -> int:
        return 1

    async def main() -> None:
        await asyncio.to_thread(invoke)

    with pytest.raises(VirtualTimeError, match="does not support threads"):
        run_virtual(main())

    async def executor() -> None:
        await asyncio.get_running_loop().run_in_executor(None, invoke)

    with pytest.raises(VirtualTimeError, match="invoke"):
        run_virtual(executor())


def test_a_thread_that_calls_in_is_refused() -> None:
    refused: list[BaseException] = []

    async def main() -> None:
        loop = asyncio.get_running_loop()

        def call() -> None:
            try:
                loop.call_soon_threadsafe(lambda: None)
            except VirtualTimeError as error:
                refused.append(error)

        thread = threading.Thread(target=call)
        thread.start()
        thread.join()

    run_virtual(main())
    assert len(refused) == 1


def test_sockets_and_processes_are_refused() -> None:
    async def listen() -> None:
        with socket.socket() as server:
            server.bind(("127.0.0.1", 0))
            server.listen()
            server.setblocking(False)
            await asyncio.get_running_loop().sock_accept(server)

    with pytest.raises(VirtualTimeError, match="does not support sockets"):
        run_virtual(listen())

    async def spawn() -> None:
        await asyncio.create_subprocess_exec("true")

    with pytest.raises(VirtualTimeError, match="does not support processes"):
        run_virtual(spawn())


def test_results_and_exceptions_pass_through() -> None:
    async def answer() -> int:
        return 42

    async def fail() -> None:
        raise KeyError("x")

    assert run_virtual(answer()) == 42
    with pytest.raises(KeyError):
        run_virtual(fail())


def test_timeouts_run_on_virtual_time() -> None:
    async def main() -> float:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(1000):
                await asyncio.Event().wait()
        return asyncio.get_running_loop().time()

    assert run_virtual(main()) == 1000.0


def test_the_loop_fits_asyncio_runner() -> None:
    async def main() -> float:
        await asyncio.sleep(1)
        return asyncio.get_running_loop().time()

    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        assert runner.run(main()) == 1.0
        assert runner.run(main()) == 2.0


def test_a_sleep_shorter_than_a_nanosecond_ends_at_its_instant_whoever_else_is_busy() -> None:
    async def main() -> tuple[float, int]:
        loop = asyncio.get_running_loop()
        await asyncio.sleep(1.0)
        until_s, sleeps = loop.time() + 3e-10, 0

        async def busy() -> None:
            for _ in range(100):
                await asyncio.sleep(0)

        async with asyncio.TaskGroup() as group:
            group.create_task(busy())
            while loop.time() < until_s:
                await asyncio.sleep(until_s - loop.time())
                sleeps += 1
        return loop.time() - until_s, sleeps

    assert run_virtual(main()) == (0.0, 1)

"""Finding the other processes, and the line between them, without jax: groups in threads of one process."""

import concurrent.futures
import contextlib
import http.server
import socket
import threading

import pytest

from nextllm_jax.config import Config
from nextllm_jax.distributed.process_group import ProcessGroup, facts_of
from nextllm_jax.distributed.rendezvous import DistributedConfig, ProcessInfo, find_process_info
from nextllm_jax.errors import InputError, RunFailed
from tests.processes import free_port


def config(process_id, count, port, seconds=20):
    return DistributedConfig(
        coordinator_address=f"localhost:{port}",
        num_processes=count,
        process_id=process_id,
        start_timeout_seconds=seconds,
    )


def together(configs, work):
    """What `work(group)` returns, or the exception that it raises, of a group for each config."""

    def one(config):
        with ProcessGroup(config) as group:
            try:
                group.connect()
                return work(group)
            except (InputError, RunFailed) as error:
                return error
            finally:
                group.end()  # one that leaves without would end this process

    with concurrent.futures.ThreadPoolExecutor(len(configs)) as pool:
        return list(pool.map(one, configs))


def test_all_gather_the_values_of_all_in_order():
    port = free_port()

    def work(group):
        rounds = [group.gather([group.process_id, i, "ä"]) for i in range(20)]
        return rounds, group.num_processes

    expected = [[[process, i, "ä"] for process in range(4)] for i in range(20)]
    assert together([config(i, 4, port) for i in (2, 0, 3, 1)], work) == [(expected, 4)] * 4


def test_a_group_of_one_gathers_its_own_value():
    with ProcessGroup() as group:
        group.connect()
        assert group.gather("x") == ["x"]
        group.check_same({"a": "b"})
        group.end()


def test_other_facts_are_named_with_their_process_in_all():
    port = free_port()

    def work(group):
        group.check_same({"seed": "1", "model.num_layers": "3" if group.process_id == 2 else "2"})

    errors = together([config(i, 3, port) for i in range(3)], work)
    assert {str(error).partition(";")[0] for error in errors} == {
        "process 2 has model.num_layers 3, but process 0 has 2"
    }


def test_facts_are_the_config_the_code_and_the_libraries():
    facts = facts_of(Config())
    assert facts["model.num_layers"] == "8"
    assert {"Python", "jax", "orbax-checkpoint"} <= facts.keys()
    assert any(name.startswith("the package nextllm_jax") for name in facts)


@pytest.mark.parametrize(
    ("others", "sentence"),
    [
        ([(1, 3), (1, 3)], "two processes have the process-id 1"),
        ([(1, 2)], "process 1 has num-processes 2, but process 0 has 3"),
    ],
)
def test_processes_that_do_not_go_together_are_refused(others, sentence):
    port = free_port()
    errors = together([config(0, 3, port), *(config(*other, port) for other in others)], lambda group: None)
    assert {type(error) for error in errors} == {InputError}
    assert all(sentence in str(error) for error in errors)


def test_a_process_that_does_not_come_is_named(messages, monkeypatch):
    monkeypatch.setattr("nextllm_jax.distributed.rendezvous._REPORT_SECONDS", 0.5)  # several reports before the end
    port = free_port()
    errors = together([config(i, 4, port, seconds=4) for i in (0, 2)], lambda group: None)
    assert {type(error) for error in errors} == {RunFailed}
    assert all("of 4 processes at localhost:" in str(error) and "1, 3 did not" in str(error) for error in errors)
    assert "2 joined: 0, 2" in messages.text


def test_without_process_0_the_others_give_up():
    errors = together([config(1, 2, free_port(), seconds=1)], lambda group: None)
    assert "process 1 could not reach process 0 at localhost:" in str(errors[0])


def test_a_stranger_at_the_port_is_no_process():
    port = free_port()

    def work(group):
        return group.gather(group.process_id)

    with contextlib.ExitStack() as stack, concurrent.futures.ThreadPoolExecutor(1) as pool:
        first = pool.submit(together, [config(0, 2, port)], work)
        for greeting in (b"GET / HTTP/1.1\r\n\r\n", b"\xff\n", b'{"kind": 3}\n', b""):
            stranger = None
            while stranger is None:
                with contextlib.suppress(ConnectionRefusedError):
                    stranger = stack.enter_context(socket.create_connection(("localhost", port)))
            stranger.sendall(greeting)
        assert together([config(1, 2, port)], work) == [[0, 1]]
        assert first.result() == [[0, 1]]


SLURM = {
    "SLURM_JOB_ID": "5000",
    "SLURM_STEP_NODELIST": "node[003,007-9]",
    "SLURM_NTASKS": "4",
    "SLURM_PROCID": "2",
    "SLURM_LOCALID": "0",
}
OPEN_MPI = {
    "OMPI_VERSION": "4.1.4",
    "OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1,10.148.0.1:34911",
    "OMPI_COMM_WORLD_SIZE": "3",
    "OMPI_COMM_WORLD_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
}


@pytest.mark.parametrize(
    ("environment", "place"),
    [
        (SLURM, ProcessInfo("node003:62344", 4, 2, [0])),
        (OPEN_MPI, ProcessInfo("10.96.0.1:62624", 3, 1, [1])),
        ({}, None),
    ],
)
def test_the_cluster_says_who_a_process_is(monkeypatch, environment, place):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert find_process_info(DistributedConfig()) == place
    assert find_process_info(DistributedConfig(num_processes=1)) is None


@pytest.mark.parametrize(
    "environment",
    [
        {**SLURM, "SLURM_STEP_NUM_NODES": "4", "SLURM_STEP_NUM_TASKS": "4"},
        {**OPEN_MPI, "OMPI_COMM_WORLD_LOCAL_SIZE": "1"},
    ],
)
def test_a_process_alone_on_its_machine_takes_all_devices(monkeypatch, environment):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    place = find_process_info(DistributedConfig())
    assert place is not None
    assert place.local_device_ids is None


@pytest.fixture
def tpu_vm(monkeypatch):
    """A machine that jax takes for a TPU VM; gives a function that sets its environment variables."""
    from jax._src.clusters import cloud_tpu_cluster, cluster

    for module in (cloud_tpu_cluster, cluster):
        monkeypatch.setattr(module, "running_in_cloud_tpu_vm", True)
    for name in ("TPU_SKIP_MDS_QUERY", "TPU_WORKER_HOSTNAMES", "TPU_PROCESS_ADDRESSES", "MEGASCALE_NUM_SLICES"):
        monkeypatch.delenv(name, raising=False)
    return lambda **environment: [monkeypatch.setenv(name, value) for name, value in environment.items()]


@contextlib.contextmanager
def metadata_server(attributes):
    """What Google's metadata server answers for a TPU VM, at an address of our own."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            value = attributes.get(self.path.rpartition("/")[2])
            self.send_response(404 if value is None else 200)
            self.end_headers()
            self.wfile.write((value or "").encode())

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"127.0.0.1:{server.server_address[1]}"
        server.shutdown()


def slice_of(number, slices):
    return (
        f"MEGASCALE_COORDINATOR_ADDRESS: '127.0.0.9'\nMEGASCALE_NUM_SLICES: '{slices}'\nMEGASCALE_SLICE_ID: '{number}'"
    )


@pytest.mark.parametrize(
    ("attributes", "place"),
    [
        ({"agent-worker-number": "0", "worker-network-endpoints": "127.0.0.1"}, None),
        (
            {"agent-worker-number": "2", "worker-network-endpoints": "a:1:127.0.0.5,b:2:127.0.0.6,c:3:127.0.0.7"},
            ProcessInfo("127.0.0.5:8482", 3, 2),
        ),
        (
            {
                "agent-worker-number": "1",
                "worker-network-endpoints": "127.0.0.5,127.0.0.6",
                "tpu-env": slice_of(2, 4),
            },
            ProcessInfo("127.0.0.9:8482", 8, 5),
        ),
    ],
)
def test_tpu_vms_are_found_by_their_metadata(tpu_vm, attributes, place):
    pytest.importorskip("requests")  # comes with jax[tpu]
    with metadata_server({"tpu-env": "ACCELERATOR_TYPE: 'v5litepod-16'", **attributes}) as address:
        tpu_vm(GCE_METADATA_IP=address)
        assert find_process_info(DistributedConfig()) == place


@pytest.mark.parametrize(
    ("slices", "place"),
    [
        ({}, ProcessInfo("127.0.0.5:8482", 2, 1)),
        (
            {"COORDINATOR_ADDRESS": "127.0.0.9:8081", "NUM_SLICES": "3", "SLICE_ID": "2"},
            ProcessInfo("127.0.0.9:8482", 6, 5),
        ),
    ],
)
def test_tpus_in_gke_are_found_by_their_environment(tpu_vm, slices, place):
    unset = {"COORDINATOR_ADDRESS": "", "NUM_SLICES": "", "SLICE_ID": ""}
    tpu_vm(TPU_WORKER_HOSTNAMES="127.0.0.5,127.0.0.6", TPU_WORKER_ID="1", TPU_SKIP_MDS_QUERY="true")
    tpu_vm(**{f"MEGASCALE_{name}": value for name, value in {**unset, **slices}.items()})
    with metadata_server({"tpu-env": ""}) as address:
        tpu_vm(GCE_METADATA_IP=address)
        assert find_process_info(DistributedConfig()) == place


def test_flags_overrule_the_cluster(monkeypatch):
    for name, value in SLURM.items():
        monkeypatch.setenv(name, value)
    assert find_process_info(DistributedConfig(coordinator_address="host:1234")) == ProcessInfo("host:1234", 4, 2, [0])


BAD_FLAGS = {
    "process-id": ({"process_id": 2, "num_processes": 2}, "process_id is 2; it must be between 0 and 1"),
    "negative": ({"process_id": -1}, "process_id is -1"),
    "count": ({"num_processes": 0}, "num_processes is 0; it must be positive"),
    "no port": ({"coordinator_address": "localhost"}, "coordinator_address is localhost; it must be HOST:PORT"),
    "port": ({"coordinator_address": "localhost:70000"}, "must be HOST:PORT"),
    "timeout": ({"start_timeout_seconds": 0}, "start_timeout_seconds is 0"),
    "alone": ({"process_id": 1}, "distributed.coordinator_address and distributed.num_processes must be set too"),
}


@pytest.mark.parametrize("case", BAD_FLAGS)
def test_bad_flags_are_refused(case):
    fields, sentence = BAD_FLAGS[case]
    with pytest.raises(InputError, match=sentence):
        find_process_info(DistributedConfig(**fields))

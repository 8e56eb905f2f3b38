"""What shall follow a training, and whether it can, said before the training instead of after it."""

from __future__ import annotations

from daemon.errors import JobFailed
from daemon.queue.job import ClaimedJob
from daemon.queue.outcome import Wanted
from daemon.report.reporter import Reporter
from daemon.serving.fit import misfits
from daemon.serving.push import hub_token
from daemon.settings import Settings
from training.events import ErrorCode
from training.spec import Hyperparameters


def wanted_deliveries(asked: Hyperparameters, settings: Settings) -> tuple[Wanted, ...]:
    """Returns what the job asks for, and the endpoint where this host knows one."""
    wanted = [Wanted(kind) for kind in asked.exports]
    if asked.push_to_hub is not None:
        wanted.append(Wanted("hub", asked.push_to_hub))
    if asked.deploy or (asked.deploy is None and settings.endpoint_url is not None):
        wanted.append(Wanted("endpoint", asked.deploy if isinstance(asked.deploy, str) else ""))
    return tuple(wanted)


async def check_deliveries(
    job: ClaimedJob, base_model: str, asked: Hyperparameters, settings: Settings, reporter: Reporter
) -> None:
    """Tells in the job's story what will not be possible as things are.

    Raises JobFailed if the job asks to be served and its adapter would not fit the endpoint: it would be paid for in
    vain."""
    if asked.push_to_hub is not None and settings.hub_tokens and hub_token(settings, job.user_id) is None:
        reporter.tell(
            "no_hub_token",
            f"The service has no token of yours for the hub: the adapter will not be pushed to {asked.push_to_hub}.",
        )
    if asked.deploy is False:
        return
    if settings.endpoint_url is None:
        if asked.deploy:
            reporter.tell("no_endpoint", "This host knows no endpoint: the adapter waits for a host that knows one.")
        return
    faults = await misfits(settings, base_model, asked)
    if not faults:
        return
    listed = "; ".join(faults)
    if asked.deploy:
        raise JobFailed(
            ErrorCode.INVALID_SPEC,
            f"The job asks to be served, and its adapter would not fit the endpoint: {listed}.",
            "Change what is named, or leave deploy out to train it all the same.",
        )
    reporter.tell("endpoint_misfit", f"The adapter will not fit the operator's endpoint: {listed}.")

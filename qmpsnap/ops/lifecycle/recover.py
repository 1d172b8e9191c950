"""Recovery of a broken ``define``, and removing the folder of a machine that goes."""

from qmpsnap.host.threads import to_end
from qmpsnap.model.home import Home
from qmpsnap.model.operations.operation import DefinePlan
from qmpsnap.ops.base.async_store import blocking
from qmpsnap.ops.base.overlays import remove_new
from qmpsnap.ops.session.pending import Broken, Direction
from qmpsnap.qmp.session import Monitor


async def end(broken: Broken[DefinePlan], _: Monitor | None) -> Direction:
    """Undo a definition that did not settle: it has no machine yet, and nobody can have used its images."""
    plan = broken.operation.plan
    await remove_new([*plan.images, *plan.overlays])
    if plan.change.define:
        await blocking(broken.context.store.records.take_back, plan.change.define)
    made = plan.variables is not None  # a file that was there before it was planned has prevented the plan
    await to_end(lambda: remove_folder(broken.context.home, plan.machine, variables=made))
    await broken.mark_failed()
    return "back"


def remove_folder(home: Home, machine: str, *, variables: bool = True) -> None:
    """Remove a machine's folder, unless somebody has put other files there; with ``variables`` its variable store."""
    folder = home.machine_dir(machine)
    if folder.is_symlink():
        return  # what it leads to is not ours
    if variables:
        home.variables(machine).unlink(missing_ok=True)
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()

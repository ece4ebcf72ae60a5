"""``i2am dashboard``: make the project's workspace and report in Weights & Biases, or write their definition."""

from __future__ import annotations

from i2am_train.config.tracking import DashboardConfig
from i2am_train.json_files import require_own_json, write_json
from i2am_train.tracking.dashboard import dashboard_json, save_dashboard


def run(config: DashboardConfig) -> None:
    """Save both and print their addresses; with ``output`` write a file instead, without network.

    Raises:
        TrackingError: not logged in, or the server cannot be reached.
    """
    if config.output is not None:
        require_own_json(config.output, ("project", "workspace", "report"))
        write_json(config.output, dashboard_json(config.project, config.group))
        print(f"Definition of workspace and report: {config.output}")
        return
    workspace, report = save_dashboard(config.entity, config.project, config.group)
    print(f"Workspace: {workspace}\nReport:    {report}")

"""The study of longer contexts; as many processes as there are GPUs may share its folder."""

from __future__ import annotations

import os
from dataclasses import asdict

from ..study_jobs.folder import Study
from .plan import Plan, check, jobs
from .workbench import Workbench


def _known(plan: Plan) -> tuple[dict, None]:
    """All but the sections, which may change when a study is continued."""
    settings = {key: value for key, value in asdict(plan).items() if key != "sections"}
    return {**settings, "text": os.path.basename(plan.text)}, None


STUDY = Study(check, _known, jobs, Workbench)

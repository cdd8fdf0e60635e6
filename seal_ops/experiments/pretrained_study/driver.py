"""The study of a pretrained model; as many processes as there are GPUs may share its folder."""

from dataclasses import asdict

from ..study_jobs.folder import Study
from .plan import Plan, check, jobs
from .workbench import Workbench

FREE = ("sections", "text")  # may change when a study is continued


def _known(plan: Plan) -> tuple[dict, dict]:
    wanted, defaults = ({k: v for k, v in asdict(p).items() if k not in FREE} for p in (plan, Plan()))
    return wanted, defaults


STUDY = Study(check, _known, jobs, lambda model, output, plan, **options: Workbench(model, output, **options))

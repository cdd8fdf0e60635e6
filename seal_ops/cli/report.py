"""``seal report``."""

from .command import Command


def options(parser):
    parser.add_argument("folder", metavar="DIR", help="what a command left there, and in its direct subfolders")
    parser.add_argument("--output", metavar="FILE", help="the HTML file (default: DIR/report.html)")
    parser.add_argument("--title", help="heading (default: the folder's name)")


def run(args):
    from ..report.html import write_report

    print(write_report(args.folder, args.output, title=args.title))


COMMAND = Command(
    "one self-contained HTML file of what a run left in a folder",
    "seal report demo-results",
    options,
    run,
)

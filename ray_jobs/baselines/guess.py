"""Guessing in a comparison: the commonest answers of the training questions, or random ones, whatever the photo shows."""

from addressvlm.baselines.guessing import Guesser
from addressvlm.config.compare import GuessConfig
from addressvlm.evaluation.run_questions import questions_of
from addressvlm.storage import tables
from ray_jobs import evaluation
from ray_jobs.baselines.system import ComparisonContext, System, SystemOutcome
from ray_jobs.evaluation import PHOTO_COLUMNS, TEST


class GuessSystem(System[GuessConfig]):
    """Answers from the training questions alone."""

    def run(self, context: ComparisonContext, redo: bool = False) -> SystemOutcome:
        task, wanted = context.task, set(context.ids[TEST])
        training = (turn for row in tables.iter_rows(task.data, "train", ["rounds"]) for turn in row["rounds"])
        guesser = Guesser(training, self.settings.by, context.config.seed)
        photos = (row for row in tables.iter_rows(task.data, TEST, PHOTO_COLUMNS) if row["id"] in wanted)
        answers = ({**q, "answer": guesser.answer(q)} for photo in photos for q in questions_of(photo))
        evaluation.write_answers(task, self.name, answers, {"system": self.settings.model_dump()})
        return SystemOutcome(answered=True)

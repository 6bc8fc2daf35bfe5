from fw_train.checkpoint.schedule import SaveSchedule


def saves(schedule, steps, seconds_per_step):
    saved = []
    for step in steps:
        if schedule.due(step, step * seconds_per_step):
            schedule.started(step, step * seconds_per_step)
            saved.append(step)
    return saved


def test_by_steps():
    assert saves(SaveSchedule(10, 0, 60, 0, 0.0), range(1, 35), 1.0) == [10, 20, 30]
    assert saves(SaveSchedule(10, 0, 60, 17, 0.0), range(18, 35), 1.0) == [20, 30], "after a resume in between"
    assert saves(SaveSchedule(10, 0, 60, 20, 0.0), range(20, 31), 1.0) == [30], "not the step that was loaded"


def test_by_time():
    assert saves(SaveSchedule(1000, 15.0, 60, 0, 0.0), range(1, 40), 4.0) == [4, 8, 12, 16, 20, 24, 28, 32, 36]
    assert saves(SaveSchedule(10, 15.0, 60, 0, 0.0), range(1, 25), 4.0) == [4, 8, 10, 14, 18, 20, 24]


def test_a_save_that_was_put_off_is_made_up_for():
    schedule = SaveSchedule(10, 0, 60, 0, 0.0)
    assert [step for step in range(8, 14) if schedule.due(step, 0.0)] == [10, 11, 12, 13]
    schedule.started(13, 0.0)
    assert [step for step in range(13, 22) if schedule.due(step, 0.0)] == [20, 21]


def test_a_failed_save_is_tried_again_after_the_pause():
    schedule = SaveSchedule(10, 0, 60.0, 0, 0.0)
    schedule.started(10, 100.0)
    schedule.failed(105.0)
    assert not schedule.due(11, 164.9)
    assert schedule.due(12, 165.0)
    schedule.started(12, 165.0)
    assert not schedule.due(13, 170.0), "that one is good"
    assert schedule.due(20, 170.0)

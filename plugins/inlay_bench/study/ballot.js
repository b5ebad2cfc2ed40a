"use strict";
/* What is asked, what was answered, what is kept. Knows nothing of the page around it.

   study: as the page holds it. store: getItem and setItem, as localStorage has them; null where
   nothing can be kept. clock: milliseconds. voter: makes the number of a new voter. */
class Ballot {
  constructor(study, store, clock, voter) {
    Object.assign(this, { study, store, clock });
    this.state = this.restored() ?? {
      voter: voter(), name: "", at: 0, answers: {}, began: new Date(clock()).toISOString(),
    };
    this.picked = []; // of a ranking, the best first
    this.shown = clock();
  }

  get key() { return `inlay-study-${this.study.id}`; }
  get total() { return this.study.questions.length; }
  get answered() { return Object.keys(this.state.answers).length; }
  get finished() { return this.answered === this.total; }

  /* The question that is open; undefined behind the last. */
  get question() { return this.study.questions[this.state.at]; }
  get given() { return this.question && this.state.answers[this.question.id]?.answer; }

  /* One key or click: number 1, 2, ... of what is offered, 0 for "no difference". Whether it meant
     anything. */
  choose(number) {
    if (!this.question) return false;
    const { design, points, ties } = this.study;
    const options = this.question.options;
    if (design === "likert") return number >= 1 && number <= points && this.answer(number);
    if (number === 0) return ties && this.answer("tie");
    if (number > options.length) return false;
    return design === "rank" ? this.pick(options[number - 1]) : this.answer(options[number - 1]);
  }

  /* Put a picture next in the ranking, or take it and those behind it out again. */
  pick(picture) {
    const place = this.picked.indexOf(picture);
    if (place >= 0) this.picked.splice(place);
    else this.picked.push(picture);
    const rest = this.question.options.filter((each) => !this.picked.includes(each));
    if (rest.length === 1) this.picked.push(...rest);
    return this.picked.length === this.question.options.length ? this.answer([...this.picked]) : true;
  }

  answer(value) {
    const spent = this.state.answers[this.question.id]?.seconds ?? 0;
    const seconds = Math.round(spent * 10 + (this.clock() - this.shown) / 100) / 10;
    this.state.answers[this.question.id] = { answer: value, seconds };
    return this.go(this.state.at + 1);
  }

  back() { return this.go(this.state.at - 1); }

  go(at) {
    if (at < 0 || at > this.total) return false;
    this.state.at = at;
    this.picked = [];
    this.shown = this.clock();
    this.keep();
    return true;
  }

  call(name) {
    this.state.name = name;
    this.keep();
  }

  /* The file of votes: what was shown, in which order, and what was said of it. */
  file() {
    const { id, design, seed, questions } = this.study;
    const { voter, name, began, answers } = this.state;
    const votes = questions.filter((q) => answers[q.id]).map((q) => (
      { question: q.id, shown: q.options, ...answers[q.id] }
    ));
    const ended = new Date(this.clock()).toISOString();
    return { inlay_votes: 1, study: id, design, seed, voter, name, began, ended, votes };
  }

  restored() {
    try {
      const state = JSON.parse(this.store.getItem(this.key));
      return state?.answers && state.at >= 0 && state.at <= this.total ? state : null;
    } catch { return null; }
  }

  keep() {
    try { this.store.setItem(this.key, JSON.stringify(this.state)); } catch { /* then it is not kept */ }
  }
}

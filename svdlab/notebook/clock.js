// The clock that clips share: play, step and scrub. What has a clock is a subclass that draws a frame.

const SVG = "http://www.w3.org/2000/svg";
// Drawn, since not every font has these signs.
const SIGNS = {
  Play: "M3 1 11 6 3 11z",
  Pause: "M2 1h3v10H2zM7 1h3v10H7z",
  "One frame back": "M2 1h2v10H2zM10 1 4 6l6 5z",
  "One frame forward": "M8 1h2v10H8zM2 1l6 5-6 5z",
};

function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...children);
  return made;
}

function name(button, label) {
  button.title = label;
  button.setAttribute("aria-label", label);
  const sign = document.createElementNS(SVG, "svg");
  sign.setAttribute("viewBox", "0 0 12 12");
  sign.setAttribute("aria-hidden", "true");
  sign.appendChild(document.createElementNS(SVG, "path")).setAttribute("d", SIGNS[label]);
  button.replaceChildren(sign);
}

// Calls `changed` with {frame} or {playing} for what a hand does.
class Clock {
  constructor(changed = () => {}, ...more) {
    Object.assign(this, { changed, frame: 0, playing: true, frames: 0, fps: 1, tick: 0 });
    this.play = this.button("Pause", () => this.setPlaying(!this.playing, true));
    this.slider = element("input", { type: "range", min: 0, "aria-label": "frame" });
    this.slider.oninput = () => this.pauseAt(Number(this.slider.value));
    this.place = element("output");
    const back = this.button("One frame back", () => this.pauseAt(this.frame - 1));
    const forward = this.button("One frame forward", () => this.pauseAt(this.frame + 1));
    // JupyterLab would take the keys for its own.
    const about = { class: "controls svdlab-clock", role: "group", "data-lm-suppress-shortcuts": "true" };
    this.controls = element("div", about, this.play, back, forward, this.slider, this.place, ...more);
    const still = matchMedia("(prefers-reduced-motion: reduce)").matches;
    this.setPlaying(!still, still);
  }

  button(label, pressed) {
    const made = element("button", { type: "button" });
    name(made, label);
    made.onclick = pressed;
    return made;
  }

  // From now on there are that many frames, at that rate.
  count(frames, fps) {
    Object.assign(this, { frames, fps, frame: Math.min(this.frame, frames - 1) });
    this.slider.max = frames - 1;
    this.run();
  }

  setPlaying(playing, byHand = false) {
    this.playing = playing;
    name(this.play, playing ? "Pause" : "Play");
    if (byHand) this.changed(playing ? { playing } : { playing, frame: this.frame });
    this.run();
  }

  setFrame(frame) {
    this.frame = this.frames ? (frame + this.frames) % this.frames : frame;
    this.run();
  }

  pauseAt(frame) {
    this.setFrame(frame);
    this.setPlaying(false, true);
  }

  // Whether `draw` is to be called again though the clock stands still.
  get moves() {
    return false;
  }

  // Draw now, and from now on as long as anything moves.
  run() {
    cancelAnimationFrame(this.tick);
    if (!this.frames) return;
    const first = this.frame, start = performance.now();
    const step = (now) => {
      const gone = Math.floor((Math.max(0, now - start) / 1000) * this.fps);
      if (this.playing) this.frame = (first + gone) % this.frames;
      this.draw(now);
      this.tell();
      if (this.playing || this.moves) this.tick = requestAnimationFrame(step);
    };
    step(start);
  }

  tell() {
    this.slider.value = this.frame;
    const place = `frame ${this.frame + 1} of ${this.frames}`;
    if (this.place.textContent !== place) this.place.textContent = place;
    this.slider.setAttribute("aria-valuetext", place);
  }

  // Keep in step with a widget's model; returns what ends that.
  follow(model) {
    this.setFrame(model.get("frame"));
    if (this.playing) this.setPlaying(model.get("playing"));
    const heard = {
      "change:frame": () => this.setFrame(model.get("frame")),
      "change:playing": () => this.setPlaying(model.get("playing")),
    };
    for (const [event, hear] of Object.entries(heard)) model.on(event, hear);
    return () => {
      for (const [event, hear] of Object.entries(heard)) model.off(event, hear);
      this.end();
    };
  }

  end() {
    cancelAnimationFrame(this.tick);
  }
}

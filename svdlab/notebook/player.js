// Clips of one size on one clock: a widget of a notebook, and every figure of its class in a page without a kernel.

const BLINK_MS = 600;
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

async function decoded(source) {
  const image = new Image();
  image.src = source;
  await image.decode();
  return image;
}

// Draws what `show` is given into an element, and calls `changed` with {frame} or {playing} for what a hand does there.
class Player {
  constructor(root, changed = () => {}) {
    Object.assign(this, { root, changed, frame: 0, playing: true, blinking: false, shown: null, asked: 0, tick: 0 });
    this.views = element("div", { class: "views" });
    this.play = this.button("Pause", () => this.setPlaying(!this.playing, true));
    this.slider = element("input", { type: "range", min: 0, "aria-label": "frame" });
    this.slider.oninput = () => this.pauseAt(Number(this.slider.value));
    this.place = element("output");
    const help = "the second clip in the place of the first, in turns";
    this.blink = element("button", { type: "button", title: help }, "Blink");
    this.blink.onclick = () => this.setBlinking(!this.blinking);
    this.note = element("p", { class: "note" });
    const back = this.button("One frame back", () => this.pauseAt(this.frame - 1));
    const forward = this.button("One frame forward", () => this.pauseAt(this.frame + 1));
    // JupyterLab would take the keys for its own.
    const suppress = { "data-lm-suppress-shortcuts": "true" };
    const parts = [this.play, back, forward, this.slider, this.place, this.blink];
    this.controls = element("div", { class: "controls", role: "group", ...suppress }, ...parts);
    root.replaceChildren(this.views, this.controls, this.note);
    const still = matchMedia("(prefers-reduced-motion: reduce)").matches;
    this.setPlaying(!still, still);
  }

  button(label, pressed) {
    const made = element("button", { type: "button" });
    name(made, label);
    made.onclick = pressed;
    return made;
  }

  // All clips change at once, when the last of them is decoded, unless newer ones were asked for meanwhile.
  async show({ clips, frames, height, width, fps, columns, blink, note }) {
    const asked = ++this.asked;
    const images = await Promise.all(clips.map((clip) => decoded(clip.src)));
    if (asked !== this.asked) return;
    this.shown = { clips, images, frames, height, width, fps };
    this.views.style.gridTemplateColumns = columns;
    this.views.replaceChildren(
      ...clips.map(({ title }) => {
        const canvas = element("canvas", { width, height, role: "img", "aria-label": title });
        return element("div", { class: "view" }, element("div", { class: "title" }, title), canvas);
      }),
    );
    this.slider.max = frames - 1;
    this.blink.hidden = !blink;
    this.controls.hidden = frames === 1 && !blink;
    if (!blink) this.setBlinking(false);
    this.note.textContent = note;
    this.note.hidden = !note;
    this.frame = Math.min(this.frame, frames - 1);
    this.run();
  }

  setPlaying(playing, byHand = false) {
    this.playing = playing;
    name(this.play, playing ? "Pause" : "Play");
    if (byHand) this.changed(playing ? { playing } : { playing, frame: this.frame });
    this.run();
  }

  setBlinking(blinking) {
    this.blinking = blinking;
    this.blink.setAttribute("aria-pressed", blinking);
    this.run();
  }

  setFrame(frame) {
    if (this.shown) frame = (frame + this.shown.frames) % this.shown.frames;
    this.frame = frame;
    this.run();
  }

  pauseAt(frame) {
    this.setFrame(frame);
    this.setPlaying(false, true);
  }

  // Draw now, and from now on as long as anything moves.
  run() {
    cancelAnimationFrame(this.tick);
    if (!this.shown) return;
    const { frames, fps } = this.shown;
    const first = this.frame, start = performance.now();
    const step = (now) => {
      if (this.playing) this.frame = (first + Math.floor((Math.max(0, now - start) / 1000) * fps)) % frames;
      this.draw(Math.floor(now / BLINK_MS) % 2 === 1);
      if (this.playing || this.blinking) this.tick = requestAnimationFrame(step);
    };
    step(start);
  }

  draw(second) {
    const { clips, images, frames, height, width } = this.shown;
    [...this.views.children].forEach((view, at) => {
      const of = at === 0 && this.blinking && second ? 1 : at;
      const [title, canvas] = view.children;
      if (title.textContent !== clips[of].title) title.textContent = clips[of].title;
      canvas.getContext("2d").drawImage(images[of], 0, this.frame * height, width, height, 0, 0, width, height);
    });
    this.slider.value = this.frame;
    const place = `frame ${this.frame + 1} of ${frames}`;
    if (this.place.textContent !== place) this.place.textContent = place;
    this.slider.setAttribute("aria-valuetext", place);
  }

  end() {
    this.asked += 1;
    cancelAnimationFrame(this.tick);
  }
}

function render({ model, el }) {
  el.classList.add("svdlab-player");
  el.setAttribute("role", "group");
  el.setAttribute("aria-label", "clips");
  const player = new Player(el, (values) => {
    for (const [name, value] of Object.entries(values)) model.set(name, value);
    model.save_changes();
  });
  player.setFrame(model.get("frame"));
  if (player.playing) player.setPlaying(model.get("playing"));
  player.show(model.get("content"));
  const heard = {
    "change:content": () => player.show(model.get("content")),
    "change:frame": () => player.setFrame(model.get("frame")),
    "change:playing": () => player.setPlaying(model.get("playing")),
  };
  for (const [event, hear] of Object.entries(heard)) model.on(event, hear);
  return () => {
    for (const [event, hear] of Object.entries(heard)) model.off(event, hear);
    player.end();
  };
}

for (const figure of document.querySelectorAll("figure.svdlab-player[data-player]")) {
  const clips = [...figure.querySelectorAll("img")].map((image) => ({ title: image.alt, src: image.src }));
  const content = { ...JSON.parse(figure.dataset.player), clips };
  figure.removeAttribute("data-player"); // it lives
  new Player(figure).show(content);
}

export default { render };

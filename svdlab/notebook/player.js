// Clips of one size on one clock: a widget of a notebook, and every figure of its class in a page without a kernel.

const BLINK_MS = 600;
async function decoded(source) {
  const image = new Image();
  image.src = source;
  await image.decode();
  return image;
}

// Draws what `show` is given into an element, and calls `changed` with {frame} or {playing} for what a hand does there.
class Player extends Clock {
  constructor(root, changed) {
    const help = "the second clip in the place of the first, in turns";
    const blink = element("button", { type: "button", title: help }, "Blink");
    super(changed, blink);
    Object.assign(this, { blink, blinking: false, shown: null, asked: 0 });
    this.blink.onclick = () => this.setBlinking(!this.blinking);
    this.views = element("div", { class: "views" });
    this.note = element("p", { class: "note" });
    root.replaceChildren(this.views, this.controls, this.note);
  }

  // All clips change at once, when the last of them is decoded, unless newer ones were asked for meanwhile.
  async show({ clips, frames, height, width, fps, columns, blink, note }) {
    const asked = ++this.asked;
    const images = await Promise.all(clips.map((clip) => decoded(clip.src)));
    if (asked !== this.asked) return;
    this.shown = { clips, images, height, width };
    this.frames = 0; // not drawn before all of it is known
    this.views.style.gridTemplateColumns = columns;
    this.views.replaceChildren(
      ...clips.map(({ title }) => {
        const canvas = element("canvas", { width, height, role: "img", "aria-label": title });
        return element("div", { class: "view" }, element("div", { class: "title" }, title), canvas);
      }),
    );
    this.blink.hidden = !blink;
    this.controls.hidden = frames === 1 && !blink;
    if (!blink) this.setBlinking(false);
    this.note.textContent = note;
    this.note.hidden = !note;
    this.count(frames, fps);
  }

  setBlinking(blinking) {
    this.blinking = blinking;
    this.blink.setAttribute("aria-pressed", blinking);
    this.run();
  }

  get moves() {
    return this.blinking;
  }

  draw(now) {
    const { clips, images, height, width } = this.shown;
    const second = Math.floor(now / BLINK_MS) % 2 === 1;
    [...this.views.children].forEach((view, at) => {
      const of = at === 0 && this.blinking && second ? 1 : at;
      const [title, canvas] = view.children;
      if (title.textContent !== clips[of].title) title.textContent = clips[of].title;
      canvas.getContext("2d").drawImage(images[of], 0, this.frame * height, width, height, 0, 0, width, height);
    });
  }

  end() {
    this.asked += 1;
    super.end();
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
  const end = player.follow(model);
  const show = () => player.show(model.get("content"));
  show();
  model.on("change:content", show);
  return () => {
    model.off("change:content", show);
    end();
  };
}

for (const figure of document.querySelectorAll("figure.svdlab-player[data-player]")) {
  const clips = [...figure.querySelectorAll("img")].map((image) => ({ title: image.alt, src: image.src }));
  const content = { ...JSON.parse(figure.dataset.player), clips };
  figure.removeAttribute("data-player"); // it lives
  const player = new Player(figure);
  player.show(content);
  figure.addEventListener("svdlab-show", ({ detail }) => player.show(detail)); // from a figure around it
}

export default { render };

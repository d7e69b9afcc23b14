// The grid of an explorer in a page without a kernel: a slider over its settings, the fix off and on, the bug. What is
// shown was computed before; the player and the chart inside the figure redraw what they are handed.

const made = (tag, attributes = {}, ...children) => {
  const element = Object.assign(document.createElement(tag), attributes);
  element.append(...children);
  return element;
};

function live(figure, { axis, unit, labels, start, choices, bugs, sprites }, id) {
  const parts = (name) => figure.querySelector(name);
  const [title, number, player, chart] = ["h3", ".number", ".svdlab-player", ".svdlab-chart"].map(parts);
  const show = (target, detail) => target.dispatchEvent(new CustomEvent("svdlab-show", { detail }));
  const said = made("p", { className: "said", role: "status" });
  const slider = made("input", { type: "range", min: 0, max: labels.length - 1, value: start });
  const place = made("output");
  const fix = Object.entries(choices).map(([value, text], i) => {
    const radio = made("input", { type: "radio", name: id, value, checked: i === 0 });
    return [radio, made("label", {}, radio, ` ${text}`)];
  });
  const bug = made("select", {}, ...bugs.map(({ name }, value) => made("option", { value }, name)));
  const group = made("fieldset", {}, made("legend", {}, "the fix"), ...fix.map(([, label]) => label));
  const controls = made("div", { className: "controls" }, group);
  if (bugs.length > 1) controls.append(made("label", {}, made("span", {}, "the bug"), bug));
  if (labels.length > 1) controls.append(made("label", {}, made("span", {}, unit ? `${axis} (${unit})` : axis), slider, place));

  const missing = made("p", {}, "This page has no room for the clips of this setting: a notebook with a kernel makes them.");

  // The chart has the lines of all choices: it is drawn anew for another bug or setting only.
  function draw(redraw) {
    const at = slider.valueAsNumber, { name, cause, cases } = bugs[bug.selectedIndex];
    const choice = fix.find(([radio]) => radio.checked)[0].value, { about, clips, numbers, plot } = cases[at];
    slider.setAttribute("aria-valuetext", labels[at]);
    place.value = labels[at];
    title.textContent = `${name}: ${cause}`;
    said.textContent = `Shown: ${choices[choice]}, ${name}, ${axis} ${labels[at]}`;
    number.innerHTML = numbers[choice];
    player.hidden = !clips;
    missing.hidden = !!clips;
    if (clips) show(player, { ...about, clips: clips[choice].map(([title, sprite]) => ({ title, src: sprites[sprite] })) });
    if (redraw) show(chart, plot);
  }
  controls.addEventListener("input", ({ target }) => draw(target === slider || target === bug));
  title.after(controls, said);
  player.after(missing);
  figure.querySelector(".without").remove();
  draw(false);
}

document.querySelectorAll("figure.svdlab-fix-grid").forEach(async (figure, i) => {
  const pictures = [...figure.querySelectorAll(".svdlab-player img")].map(({ src }) => src); // before the player draws them
  const grid = await unpacked(figure.querySelector(":scope > script").textContent);
  grid.shown.forEach((sprite, at) => (grid.sprites[sprite] = pictures[at]));
  live(figure, grid, `svdlab-fix-grid-${i}`);
});

// Without this script, all maps of all blocks are there.
document.documentElement.classList.add("js");
document.addEventListener("DOMContentLoaded", () => {
  const clip = document.querySelector(".clip");
  if (!clip) return;
  const audio = clip.querySelector("audio");
  const seconds = Number(clip.dataset.seconds);
  const heads = [...clip.querySelectorAll(".playhead")];

  const follow = () => {
    const at = `${(100 * audio.currentTime) / seconds}%`;
    for (const head of heads) {
      head.setAttribute("x1", at);
      head.setAttribute("x2", at);
    }
    if (!audio.paused) requestAnimationFrame(follow);
  };
  for (const event of ["play", "pause", "seeking", "seeked"]) audio.addEventListener(event, follow);
  for (const map of clip.querySelectorAll(".map")) {
    map.addEventListener("click", ({ clientX }) => {
      const { left, width } = map.getBoundingClientRect();
      audio.currentTime = Math.min(((clientX - left) / width) * seconds, audio.duration || 0);
    });
  }

  const blocks = [...clip.querySelectorAll(".block")];
  const picker = clip.querySelector("#block");
  const experts = [...clip.querySelectorAll("input[name=expert]")];
  const show = () => {
    const block = blocks[picker ? picker.selectedIndex : 0];
    const lanes = block ? [...block.querySelectorAll(".lane")] : [];
    for (const each of blocks) each.classList.toggle("shown", each === block);
    // Blocks may have unequal numbers of experts.
    for (const each of experts) {
      each.disabled = each.value !== "" && !lanes.some((lane) => lane.dataset.expert === each.value);
    }
    if (experts.some((each) => each.checked && each.disabled)) experts[0].checked = true;
    const expert = experts.find((each) => each.checked)?.value ?? "";
    clip.classList.toggle("one", expert !== "");
    for (const lane of lanes) lane.hidden = expert !== "" && lane.dataset.expert !== expert;
  };
  for (const each of [picker, ...experts]) each?.addEventListener("change", show);
  // What a browser kept from the last visit.
  show();
  follow();
});
